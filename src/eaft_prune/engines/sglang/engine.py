"""The SGLang engine: scoring and writing by an HTTP server, as `/generate` answers it."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from eaft_prune.config import EngineSettings
from eaft_prune.core.generation import Decoding, ended_at
from eaft_prune.core.text import shortened
from eaft_prune.core.types import Blocks, KeepPlan, Trace, UserError
from eaft_prune.engines.base import OnTokens
from eaft_prune.engines.servers.comparing import ServerComparer
from eaft_prune.engines.servers.scoring import (
    Floats,
    Ids,
    Request,
    Told,
    check_ids,
    checked,
    numbers,
    told,
    understanding,
)
from eaft_prune.engines.servers.writing import written
from eaft_prune.engines.sglang.server import Server

_TOP = "input_top_logprobs"
_NUMBER = 128  # bytes of a log-prob with its id as JSON, amply
_BESIDE = 1 << 20  # bytes of an answer besides
_FLAT = {"val": ("float16", "float32", "float64"), "idx": ("int32", "int64")}
# as log-probs are
_PLAIN = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}


@dataclass(frozen=True)
class SglangEngine(ServerComparer):
    """A server that compares and writes; several requests are in flight, results keep order."""

    server: Server
    settings: EngineSettings
    vocab_size: int
    top_k: int
    entropy_top_k: int

    @property
    def conditions(self) -> Mapping[str, Any]:
        return {
            "engine": "sglang",
            "version": self.server.version,
            "top_k": self.server.overrides.get("num_experts_per_tok", self.top_k),
            "entropy_top_k": self.entropy_top_k,
            "server": dict(self.server.args),
        }

    def told(self, blocks: Blocks, k: int, on_tokens: OnTokens) -> Iterator[Told]:
        check_ids(blocks, self.vocab_size)
        ask = partial(self._ask, k=k)
        return told(self.server.client, self.settings, blocks, ask, on_tokens)

    def generate(
        self, prompts: Sequence[Sequence[int]], how: Decoding, first: int, on_tokens: OnTokens
    ) -> tuple[list[list[int]], list[bool]]:
        """What follows each prompt, and whether it ended by itself; prompt i is number first + i.

        The noise of a seed is the server's own, the same for base and candidate. Raises UserError
        where the server has none that a seed repeats.
        """
        if how.seed is not None and not self.server.args.get("enable_deterministic_inference"):
            raise UserError(
                "engine=sglang repeats what it draws only with --enable-deterministic-inference: "
                "give it that, or ask for nothing sampled"
            )

        def write(i: int) -> list[int]:
            return self._write(list(prompts[i]), how, first + i)

        return written(self.server.client, self.settings, prompts, how, write, on_tokens)

    def trace(self, blocks: Blocks, on_tokens: OnTokens) -> Trace:
        _refuse("profile: it does not tell router weights and norms of experts")

    def masked(self, plan: KeepPlan) -> AbstractContextManager[None]:
        _refuse("mask experts: use eval.candidates=[pruned], or")

    def _write(self, prompt: list[int], how: Decoding, number: int) -> list[int]:
        """Up to a stop of ours: the server also ends at the model's EOS, then it is asked again."""
        sampling = {
            **_PLAIN,
            "temperature": 0 if how.seed is None else how.temperature,
            "stop_token_ids": [stop[0] for stop in how.stops if len(stop) == 1],
            "no_stop_trim": True,
        }
        if how.seed is not None:
            sampling["sampling_seed"] = ((how.seed << 20) + number) % 2**31  # it holds 32 bits
        ids: list[int] = []
        while len(ids) < how.max_new_tokens and ended_at(ids, how.stops) is None:
            sampling["max_new_tokens"] = how.max_new_tokens - len(ids)
            body = {"input_ids": [prompt + ids], "sampling_params": sampling}
            client = self.server.client
            with understanding(client, "/generate", f"sglang {self.server.version}"):
                (answer,) = client.post("/generate", body, how.max_new_tokens * _NUMBER + _BESIDE)
                new = answer["output_ids"]
                if not new or not all(type(i) is int for i in new):
                    raise ValueError("no output_ids")
            ids += new
        return ids

    def _ask(self, request: Request, k: int) -> list[Told]:
        body = {
            "input_ids": request.ids_bS.tolist(),
            "sampling_params": {"max_new_tokens": 0, "temperature": 0},
            "return_logprob": True,
            "logprob_start_len": request.starts,
            "top_logprobs_num": k,
            # smaller answers from servers that know these; the others leave them unread
            "return_flat_raw_top_logprobs": True,
            "return_flat_raw_top_logprobs_b64": True,
        }
        most = request.ids_bS.size * (k + 1) * _NUMBER + _BESIDE
        client = self.server.client
        with understanding(client, "/generate", f"sglang {self.server.version}"):
            answers = client.post("/generate", body, most)
            return [
                _told(answer["meta_info"], ids, scored, start, k)
                for answer, ids, scored, start in zip(
                    answers, request.ids_bS, request.scored_bS, request.starts, strict=True
                )
            ]


def _refuse(what: str) -> NoReturn:
    raise UserError(f"engine = 'sglang' cannot {what} use engine=transformers for that")


def _told(
    meta: Mapping[str, Any],
    ids_S: NDArray[np.int32],
    scored_S: NDArray[np.bool_],
    start: int,
    k: int,
) -> Told:
    """What is told of one block's scored tokens, everything checked."""
    rows = meta["input_token_logprobs"]
    expected = len(ids_S) - start
    if len(rows) != expected:
        raise UserError(f"the server answered {len(rows)} of {expected} input log-probs")
    if [row[1] for row in rows] != ids_S[start:].tolist():
        raise UserError("the server answered log-probs of other token ids than were sent")
    logp = numbers([row[0] for row in rows[1:]], "input_token_logprobs")
    ids, top = _flat_top(meta) if f"{_TOP}_shape" in meta else _nested_top(meta, expected)
    for some in (ids, top):
        if some.shape != (expected - 1, k):
            raise UserError(
                f"the server answered top log-probs {some.shape}, not {expected - 1, k}"
            )
    chosen = np.flatnonzero(scored_S[start + 1 :])
    of_all = checked(logp, ids, top)
    return Told(of_all.logp_T[chosen], of_all.ids_TK[chosen], of_all.top_TK[chosen])


def _nested_top(meta: Mapping[str, Any], expected: int) -> tuple[Ids, Floats]:
    rows = meta[_TOP]
    if len(rows) != expected or any(row is None for row in rows[1:]):
        raise UserError(f"the server answered fewer than {expected - 1} rows of top log-probs")
    ids = np.array([[entry[1] for entry in row] for row in rows[1:]], np.int64)
    return ids, np.array([[entry[0] for entry in row] for row in rows[1:]], np.float64)


def _flat_top(meta: Mapping[str, Any]) -> tuple[Ids, Floats]:
    """Contiguous values after `null_prefix` rows without any (return_flat_raw_top_logprobs)."""
    if meta[f"{_TOP}_null_prefix"] != 1:
        found = shortened(repr(meta[f"{_TOP}_null_prefix"]))
        raise UserError(f"the server answered {found} rows of nulls, not 1")
    shape = meta[f"{_TOP}_shape"]
    ids, top = (_flat(meta, what).reshape(shape) for what in ("idx", "val"))
    return ids.astype(np.int64), top.astype(np.float64)


def _flat(meta: Mapping[str, Any], what: str) -> NDArray[Any]:
    name = f"{_TOP}_{what}_flat"
    if f"{name}_b64" not in meta:
        return np.array(meta[name], np.float64)
    kind = meta[f"{name}_b64_dtype"]
    if kind not in _FLAT[what]:
        raise UserError(f"the server answered top log-probs as {shortened(repr(kind))}")
    return np.frombuffer(base64.b64decode(meta[f"{name}_b64"]), np.dtype(kind).newbyteorder("<"))
