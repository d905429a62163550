"""Blocks -> requests in flight -> what a server tells of every scored token, in block order."""

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
from eaft_prune.core.types import Blocks, UserError
from eaft_prune.engines.base import OnTokens
from eaft_prune.engines.servers.http import HttpClient

Floats = NDArray[np.float64]
Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Request:
    """Consecutive blocks with scored tokens."""

    ids_bS: NDArray[np.int32]
    scored_bS: NDArray[np.bool_]

    @property
    def starts(self) -> list[int]:
        """The position before the first scored one of each block."""
        return [int(row.argmax()) - 1 for row in self.scored_bS]


@dataclass(frozen=True)
class Told:
    """Of T scored tokens ln p, and the K likeliest tokens at their places, in descending order."""

    logp_T: Floats
    ids_TK: Ids
    top_TK: Floats


def told(
    client: HttpClient,
    settings: EngineSettings,
    blocks: Blocks,
    ask: Callable[[Request], list[Told]],
    on_tokens: OnTokens,
) -> Iterator[Told]:
    """What `ask` finds of engine.batch_blocks at a time, engine.concurrency of them in flight."""
    some, batch = np.flatnonzero(blocks.scored_BS.any(axis=1)), settings.batch_blocks
    requests = [
        Request(blocks.ids_BS[part], blocks.scored_BS[part])
        for part in np.array_split(some, range(batch, len(some), batch))
    ]
    on_tokens((len(blocks) - len(some)) * blocks.seq_len)
    with ThreadPoolExecutor(settings.concurrency) as pool, client.together():
        for request, found in zip(requests, pool.map(ask, requests), strict=True):
            yield Told(
                np.concatenate([one.logp_T for one in found]),
                np.concatenate([one.ids_TK for one in found]),
                np.concatenate([one.top_TK for one in found]),
            )
            on_tokens(request.ids_bS.size)


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


def checked(logp_T: Floats, ids_TK: Ids, top_TK: Floats) -> Told:
    """ln p of tokens, and of the K likeliest at each place; raises UserError.

    Probabilities are at most 1, the likeliest's the largest, and those of K tokens sum to no more.
    """
    if not np.isfinite(top_TK).all():
        raise UserError("the server answered null or infinite top log-probs")
    if (top_TK > 1e-6).any() or (np.exp(top_TK).sum(axis=1) > 1 + 1e-3).any():
        raise UserError("the server answered top log-probs above 0, or that sum to more than 1")
    if (logp_T > np.minimum(top_TK.max(axis=1) + 1e-3, 1e-6)).any():
        raise UserError("the server answered log-probs above 0, or above the likeliest token's")
    if (np.diff(np.sort(ids_TK, axis=1), axis=1) == 0).any():
        raise UserError("the server answered one token twice among the likeliest")
    order_TK = np.argsort(-top_TK, axis=1, kind="stable")
    return Told(
        np.minimum(logp_T, 0.0),
        np.take_along_axis(ids_TK, order_TK, axis=1),
        np.take_along_axis(top_TK, order_TK, axis=1),
    )


def numbers(values: Sequence[Any], what: str) -> Floats:
    """Finite numbers; raises UserError where one is none."""
    if any(not isinstance(value, float | int) or not math.isfinite(value) for value in values):
        raise UserError(f"the server answered null or infinite numbers in {what}")
    return np.array(values, np.float64)
