"""Continuations -> how likely a model finds them."""

from __future__ import annotations

import numpy as np

from eaft_prune.core.harness import Continuations, Likelihoods
from eaft_prune.core.types import Blocks
from eaft_prune.engines.base import Comparer, OnTokens

VERSION = 1


def likelihoods(model: Comparer, asked: Continuations, on_tokens: OnTokens) -> Likelihoods:
    """ln p of each continuation after what stands before it, and whether it is what greedy writes.

    Sequences are filled up at their ends, which no token before sees.
    """
    width, count = max(map(len, asked.lists)), len(asked.lists)
    ids_BS, scored_BS = np.zeros((count, width), np.int32), np.zeros((count, width), np.bool_)
    for row, (ids, scored) in enumerate(zip(asked.lists, asked.scored, strict=True)):
        ids_BS[row, : len(ids)] = ids
        scored_BS[row, len(ids) - scored : len(ids)] = True
    row_BS = np.broadcast_to(np.arange(count, dtype=np.int32)[:, None], ids_BS.shape)
    blocks = Blocks(
        "eval.tasks", width, ids_BS, scored_BS, row_BS, np.zeros(count, np.int32), ("tasks",), ""
    )
    scores, top = model.likeliest(blocks, 1, on_tokens)
    likely_T = top.ids_TK[:, 0].astype(np.int64) == ids_BS[scored_BS]
    starts_R = np.concatenate([[0], np.cumsum(asked.scored)[:-1]])
    return Likelihoods(
        np.add.reduceat(scores.logp_T.astype(np.float64), starts_R),
        np.logical_and.reduceat(likely_T, starts_R),
    )
