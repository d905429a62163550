"""The SGLang engine: teacher-forced scoring by an HTTP server, as `/generate` answers it."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from eaft_prune.config import EngineSettings
from eaft_prune.core.text import shortened
from eaft_prune.core.types import Blocks, KeepPlan, TokenScores, Trace, UserError
from eaft_prune.engines.base import OnTokens
from eaft_prune.engines.servers.scoring import (
    Floats,
    Pair,
    Request,
    check_ids,
    checked,
    numbers,
    score,
    understanding,
)
from eaft_prune.engines.sglang.server import Server

_TOP = "input_top_logprobs"
_NUMBER = 128  # bytes of a log-prob with its id as JSON, amply
_BESIDE = 1 << 20  # bytes of an answer besides
_FLOATS = ("float16", "float32", "float64")


@dataclass(frozen=True)
class SglangEngine:
    """A server that scores tokens; several requests are in flight, results keep block order."""

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

    def score(self, blocks: Blocks, on_tokens: OnTokens) -> TokenScores:
        """log p and H of every scored token; raises UserError unless the server gave them all."""
        check_ids(blocks, self.vocab_size)
        return score(self.server.client, self.settings, blocks, self._ask, on_tokens)

    def trace(self, blocks: Blocks, on_tokens: OnTokens) -> Trace:
        _refuse("profile: it does not tell router weights and norms of experts")

    def masked(self, plan: KeepPlan) -> AbstractContextManager[None]:
        _refuse("mask experts: use eval.candidates=[pruned], or")

    def _ask(self, request: Request) -> list[Pair]:
        body = {
            "input_ids": request.ids_bS.tolist(),
            "sampling_params": {"max_new_tokens": 0, "temperature": 0},
            "return_logprob": True,
            "logprob_start_len": request.starts,
            "top_logprobs_num": self.entropy_top_k,
            # smaller answers from servers that know these; the others leave them unread
            "return_flat_raw_top_logprobs": True,
            "return_flat_raw_top_logprobs_b64": True,
        }
        most = request.ids_bS.size * (self.entropy_top_k + 1) * _NUMBER + _BESIDE
        client = self.server.client
        with understanding(client, "/generate", f"sglang {self.server.version}"):
            answers = client.post("/generate", body, most)
            return [
                _scores(answer["meta_info"], ids, scored, start, self.entropy_top_k)
                for answer, ids, scored, start in zip(
                    answers, request.ids_bS, request.scored_bS, request.starts, strict=True
                )
            ]


def _refuse(what: str) -> NoReturn:
    raise UserError(f"engine = 'sglang' cannot {what} use engine=transformers for that")


def _scores(
    meta: Mapping[str, Any],
    ids_S: NDArray[np.int32],
    scored_S: NDArray[np.bool_],
    start: int,
    top_k: int,
) -> Pair:
    """log p and normalised entropy of one block's scored tokens, everything checked."""
    rows = meta["input_token_logprobs"]
    expected = len(ids_S) - start
    if len(rows) != expected:
        raise UserError(f"the server answered {len(rows)} of {expected} input log-probs")
    if [row[1] for row in rows] != ids_S[start:].tolist():
        raise UserError("the server answered log-probs of other token ids than were sent")
    logp = numbers([row[0] for row in rows[1:]], "input_token_logprobs")
    top = _flat_top(meta, expected) if f"{_TOP}_shape" in meta else _nested_top(meta, expected)
    if top.shape != (expected - 1, top_k):
        raise UserError(f"the server answered top log-probs {top.shape}, not {expected - 1, top_k}")
    chosen = np.flatnonzero(scored_S[start + 1 :])
    some_logp, entropy = checked(logp, top)
    return some_logp[chosen], entropy[chosen]


def _nested_top(meta: Mapping[str, Any], expected: int) -> Floats:
    rows = meta[_TOP]
    if len(rows) != expected or any(row is None for row in rows[1:]):
        raise UserError(f"the server answered fewer than {expected - 1} rows of top log-probs")
    return np.array([[entry[0] for entry in row] for row in rows[1:]], np.float64)


def _flat_top(meta: Mapping[str, Any], expected: int) -> Floats:
    """Contiguous values after `null_prefix` rows without any (return_flat_raw_top_logprobs)."""
    name = f"{_TOP}_val_flat"
    if f"{name}_b64" in meta:
        kind = meta[f"{name}_b64_dtype"]
        if kind not in _FLOATS:
            raise UserError(f"the server answered top log-probs as {shortened(repr(kind))}")
        values = np.frombuffer(
            base64.b64decode(meta[f"{name}_b64"]), np.dtype(kind).newbyteorder("<")
        )
    else:
        values = np.array(meta[name], np.float64)
    if meta[f"{_TOP}_null_prefix"] != 1:
        found = shortened(repr(meta[f"{_TOP}_null_prefix"]))
        raise UserError(f"the server answered {found} rows of nulls, not 1")
    return values.astype(np.float64).reshape(meta[f"{_TOP}_shape"])
