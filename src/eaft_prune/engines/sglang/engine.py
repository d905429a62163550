"""The SGLang engine: teacher-forced scoring by an HTTP server, as `/generate` answers it."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from eaft_prune.core.text import shortened
from eaft_prune.core.types import Blocks, KeepPlan, TokenScores, Trace, UserError
from eaft_prune.engines.base import OnTokens
from eaft_prune.engines.sglang.server import Server

Floats = NDArray[np.float64]
_TOP = "input_top_logprobs"
_NUMBER = 128  # bytes of a log-prob with its id as JSON, amply
_BESIDE = 1 << 20  # bytes of an answer besides
_FLOATS = ("float16", "float32", "float64")


@dataclass(frozen=True)
class _Request:
    """Consecutive blocks with scored tokens, and the position before the first scored one of each.

    SGLang answers from `start` on, and knows no log p of the first position it answers.
    """

    ids_bS: NDArray[np.int32]
    scored_bS: NDArray[np.bool_]

    @property
    def starts(self) -> list[int]:
        return [int(row.argmax()) - 1 for row in self.scored_bS]


@dataclass(frozen=True)
class SglangEngine:
    """A server that scores tokens; several requests are in flight, results keep block order."""

    server: Server
    vocab_size: int
    top_k: int
    entropy_top_k: int
    batch_blocks: int  # of one request
    concurrency: int  # requests in flight

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
        self.check_ids(blocks)
        some = np.flatnonzero(blocks.scored_BS.any(axis=1))
        requests = [
            _Request(blocks.ids_BS[part], blocks.scored_BS[part])
            for part in np.array_split(some, range(self.batch_blocks, len(some), self.batch_blocks))
        ]
        on_tokens((len(blocks) - len(some)) * blocks.seq_len)
        logp, entropy = [], []
        with (
            ThreadPoolExecutor(self.concurrency, thread_name_prefix="sglang") as pool,
            self.server.client.together(),
        ):
            for request, found in zip(requests, pool.map(self._ask, requests), strict=True):
                for block_logp, block_entropy in found:
                    logp.append(block_logp)
                    entropy.append(block_entropy)
                on_tokens(request.ids_bS.size)
        return TokenScores(
            np.concatenate(logp).astype(np.float32),
            np.concatenate(entropy).astype(np.float32),
            np.nonzero(blocks.scored_BS)[0].astype(np.int32),
        )

    def trace(self, blocks: Blocks, on_tokens: OnTokens) -> Trace:
        _refuse("profile: it does not tell router weights and norms of experts")

    def masked(self, plan: KeepPlan) -> AbstractContextManager[None]:
        _refuse("mask experts: use eval.candidates=[pruned], or")

    def _ask(self, request: _Request) -> list[tuple[Floats, Floats]]:
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
        try:
            most = request.ids_bS.size * (self.entropy_top_k + 1) * _NUMBER + _BESIDE
            answers = self.server.client.post("/generate", body, most)
            return [
                _scores(answer["meta_info"], ids, scored, start, self.entropy_top_k)
                for answer, ids, scored, start in zip(
                    answers, request.ids_bS, request.scored_bS, request.starts, strict=True
                )
            ]
        except UserError:
            raise
        except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
            why = shortened(str(error), 200)
            raise UserError(
                f"{self.server.client.base_url}/generate: not an answer to what was asked "
                f"({type(error).__name__}: {why}); sglang {self.server.version}"
            ) from error

    def check_ids(self, blocks: Blocks) -> None:
        """Raise UserError on ids outside the vocabulary: one can end the server."""
        low, high = int(blocks.ids_BS.min()), int(blocks.ids_BS.max())
        if low < 0 or high >= self.vocab_size:
            raise UserError(
                f"pack {blocks.pack}: token ids {low}..{high} leave the vocabulary of "
                f"{self.vocab_size}: tokenizer and model do not belong together"
            )


def _refuse(what: str) -> NoReturn:
    raise UserError(f"engine = 'sglang' cannot {what} use engine=transformers for that")


def _scores(
    meta: Mapping[str, Any],
    ids_S: NDArray[np.int32],
    scored_S: NDArray[np.bool_],
    start: int,
    top_k: int,
) -> tuple[Floats, Floats]:
    """log p and normalised entropy of one block's scored tokens, everything checked."""
    rows = meta["input_token_logprobs"]
    expected = len(ids_S) - start
    if len(rows) != expected:
        raise UserError(f"the server answered {len(rows)} of {expected} input log-probs")
    if [row[1] for row in rows] != ids_S[start:].tolist():
        raise UserError("the server answered log-probs of other token ids than were sent")
    logp = _numbers([row[0] for row in rows[1:]], "input_token_logprobs")
    top = _flat_top(meta, expected) if f"{_TOP}_shape" in meta else _nested_top(meta, expected)
    if top.shape != (expected - 1, top_k):
        raise UserError(f"the server answered top log-probs {top.shape}, not {expected - 1, top_k}")
    if not np.isfinite(top).all():
        raise UserError("the server answered null or infinite top log-probs")
    if (top > 1e-6).any() or (np.exp(top).sum(axis=1) > 1 + 1e-3).any():
        raise UserError("the server answered top log-probs above 0, or that sum to more than 1")
    chosen = np.flatnonzero(scored_S[start + 1 :])
    best = top.max(axis=1)
    if (logp > np.minimum(best + 1e-3, 1e-6)).any():
        raise UserError("the server answered log-probs above 0, or above the likeliest token's")
    return np.minimum(logp[chosen], 0.0), _entropy(top[chosen])


def _entropy(top_TK: Floats) -> Floats:
    """Entropy of the K log-probs renormalised to 1, divided by ln K (as in head.py)."""
    log_q = top_TK - np.logaddexp.reduce(top_TK, axis=1, keepdims=True)
    entropy = -(np.exp(log_q) * log_q).sum(axis=1) / math.log(top_TK.shape[1])
    clipped: Floats = entropy.clip(0.0, 1.0)
    return clipped


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


def _numbers(values: list[Any], what: str) -> Floats:
    if any(not isinstance(value, float | int) or not math.isfinite(value) for value in values):
        raise UserError(f"the server answered null or infinite numbers in {what}")
    return np.array(values, np.float64)
