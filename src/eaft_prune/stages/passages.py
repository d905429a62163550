"""Blocks and two models' scores -> the passages that the candidate lost most on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from eaft_prune.core.passages import Passages
from eaft_prune.core.types import Blocks, TokenScores

VERSION = 1
TOKENS = 60  # of a passage
A_PACK = 4


def passages(
    blocks: Blocks,
    base: TokenScores,
    other: TokenScores,
    decode: Callable[[Sequence[int]], str],
) -> Passages:
    """Those of 60 tokens with the largest sum of ln p_base - ln p_candidate, one a block at most.

    Tokens that are not scored count nothing and are shown without a probability.
    """
    shape = blocks.ids_BS.shape
    logp = [np.full(shape, np.nan) for _ in range(2)]
    for into, scores in zip(logp, (base, other), strict=True):
        into[blocks.scored_BS] = scores.logp_T
    sums = np.cumsum(np.nan_to_num(logp[0] - logp[1]), axis=1)
    width = min(TOKENS, shape[1])
    windows = sums[:, width - 1 :].copy()
    windows[:, 1:] -= sums[:, :-width]
    first_B = windows.argmax(axis=1)
    most_B = windows.max(axis=1)
    found = []
    for block in np.argsort(-most_B, kind="stable")[:A_PACK].tolist():
        span = slice(int(first_B[block]), int(first_B[block]) + width)
        values = [
            [None if np.isnan(x) else round(float(np.exp(x)), 4) for x in part[block, span]]
            for part in logp
        ]
        found.append(
            {
                "pack": blocks.pack,
                "seq_len": blocks.seq_len,
                "change": float(most_B[block]),
                "tokens": _texts(blocks.ids_BS[block, span].tolist(), decode),
                "base": values[0],
                "candidate": values[1],
            }
        )
    return Passages(tuple(found))


def _texts(ids: list[int], decode: Callable[[Sequence[int]], str]) -> list[str]:
    """What each token adds to the text; a character of several tokens belongs to the last."""
    found, before = [], ""
    for end in range(1, len(ids) + 1):
        whole = decode(ids[:end])
        if end < len(ids) and whole.endswith("\ufffd"):
            found.append("")  # a part of a character
            continue
        found.append(whole[len(before) :])
        before = whole
    return found
