"""Random traces, and the settings that score them."""

from __future__ import annotations

from typing import Any

import numpy as np

from eaft_prune.config import PruningSettings
from eaft_prune.core.types import TokenScores, Trace

T, LAYERS, K, EXPERTS = 60, 2, 3, 7
PACKS = ("a", "b", "c")


def trace(
    seed: int, tokens: int = T, experts: int = EXPERTS, steps: int = 0, rows: int = 10
) -> Trace:
    """A random trace; the last expert is never selected. `steps` > 0 makes ties in p and H.

    Rows are of packs in turn, as in UNION, and of unequal length.
    """
    rng = np.random.default_rng(seed)
    p, h = rng.random(tokens), rng.random(tokens)
    if steps:
        p, h = (np.floor(x * steps) + 0.5 for x in (p, h))
        p, h = p / steps, h / steps
    ids = np.array(
        [[rng.permutation(experts - 1)[:K] for _ in range(LAYERS)] for _ in range(tokens)], np.int16
    )
    row_T = np.sort(rng.integers(0, rows, tokens)).astype(np.int32)
    return Trace(
        experts_TLK=ids,
        weights_TLK=rng.random(ids.shape).astype(np.float32),
        norms_TLK=(10 * rng.random(ids.shape)).astype(np.float32),
        scores=TokenScores(
            np.log(p).astype(np.float32), h.astype(np.float32), np.zeros(tokens, np.int32)
        ),
        pack_T=(row_T % len(PACKS)).astype(np.int32),
        row_T=row_T,
        packs=PACKS,
        n_experts=experts,
    )


def pruning(**changes: Any) -> PruningSettings:
    values: dict[str, Any] = {
        "name": "x", "keep_n": 4, "saliency": "gate_norm", "weight": "eaft", "reduce": "sum",
    }  # fmt: skip
    return PruningSettings(**{**values, **changes})
