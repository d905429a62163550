"""Blocks -> requests in flight -> log p and H of every scored token, in block order."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eaft_prune.config import EngineSettings
from eaft_prune.core.text import shortened
from eaft_prune.core.types import Blocks, TokenScores, UserError
from eaft_prune.engines.base import OnTokens
from eaft_prune.engines.servers.http import HttpClient

Floats = NDArray[np.float64]
Pair = tuple[Floats, Floats]  # log p and normalised entropy of a block's scored tokens


@dataclass(frozen=True)
class Request:
    """Consecutive blocks with scored tokens."""

    ids_bS: NDArray[np.int32]
    scored_bS: NDArray[np.bool_]

    @property
    def starts(self) -> list[int]:
        """The position before the first scored one of each block."""
        return [int(row.argmax()) - 1 for row in self.scored_bS]


def score(
    client: HttpClient,
    settings: EngineSettings,
    blocks: Blocks,
    ask: Callable[[Request], list[Pair]],
    on_tokens: OnTokens,
) -> TokenScores:
    """What `ask` finds of engine.batch_blocks at a time, engine.concurrency of them in flight."""
    some, batch = np.flatnonzero(blocks.scored_BS.any(axis=1)), settings.batch_blocks
    requests = [
        Request(blocks.ids_BS[part], blocks.scored_BS[part])
        for part in np.array_split(some, range(batch, len(some), batch))
    ]
    on_tokens((len(blocks) - len(some)) * blocks.seq_len)
    logp, entropy = [], []
    with ThreadPoolExecutor(settings.concurrency) as pool, client.together():
        for request, found in zip(requests, pool.map(ask, requests), strict=True):
            for block_logp, block_entropy in found:
                logp.append(block_logp)
                entropy.append(block_entropy)
            on_tokens(request.ids_bS.size)
    return TokenScores(
        np.concatenate(logp).astype(np.float32),
        np.concatenate(entropy).astype(np.float32),
        np.nonzero(blocks.scored_BS)[0].astype(np.int32),
    )


@contextmanager
def understanding(client: HttpClient, path: str, program: str) -> Iterator[None]:
    """Reading an answer of `path` within it: what makes no sense of it is a UserError of its own.

    program: name and version of the server.
    """
    try:
        yield
    except UserError:
        raise
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        why = shortened(str(error), 200)
        raise UserError(
            f"{client.base_url}{path}: not an answer to what was asked "
            f"({type(error).__name__}: {why}); {program}"
        ) from error


def check_ids(blocks: Blocks, vocab_size: int) -> None:
    """Raise UserError on ids outside the vocabulary: one can end the server."""
    low, high = int(blocks.ids_BS.min()), int(blocks.ids_BS.max())
    if low < 0 or high >= vocab_size:
        raise UserError(
            f"pack {blocks.pack}: token ids {low}..{high} leave the vocabulary of "
            f"{vocab_size}: tokenizer and model do not belong together"
        )


def checked(logp_T: Floats, top_TK: Floats) -> Pair:
    """log p and H of tokens whose K likeliest alternatives are known; raises UserError.

    Probabilities are at most 1, the likeliest's the largest, and those of K tokens sum to no more.
    """
    if not np.isfinite(top_TK).all():
        raise UserError("the server answered null or infinite top log-probs")
    if (top_TK > 1e-6).any() or (np.exp(top_TK).sum(axis=1) > 1 + 1e-3).any():
        raise UserError("the server answered top log-probs above 0, or that sum to more than 1")
    if (logp_T > np.minimum(top_TK.max(axis=1) + 1e-3, 1e-6)).any():
        raise UserError("the server answered log-probs above 0, or above the likeliest token's")
    return np.minimum(logp_T, 0.0), _entropy(top_TK)


def numbers(values: Sequence[Any], what: str) -> Floats:
    """Finite numbers; raises UserError where one is none."""
    if any(not isinstance(value, float | int) or not math.isfinite(value) for value in values):
        raise UserError(f"the server answered null or infinite numbers in {what}")
    return np.array(values, np.float64)


def _entropy(top_TK: Floats) -> Floats:
    """Entropy of the K log-probs renormalised to 1, divided by ln K (as in head.py)."""
    log_q = top_TK - np.logaddexp.reduce(top_TK, axis=1, keepdims=True)
    entropy = -(np.exp(log_q) * log_q).sum(axis=1) / math.log(top_TK.shape[1])
    clipped: Floats = entropy.clip(0.0, 1.0)
    return clipped
