"""How far two rankings, or two keep plans, agree: pure functions, one number a layer."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from eaft_prune.core.types import KeepPlan


def jaccard(one: KeepPlan, other: KeepPlan) -> NDArray[np.float64]:
    """Experts kept by both / kept by either, of every layer; 1 = the same (Jaccard, 1912)."""
    pairs = zip(one.kept, other.kept, strict=True)
    return np.array([len({*a} & {*b}) / len({*a} | {*b}) for a, b in pairs])


def spearman(one_LE: NDArray[np.float64], other_LE: NDArray[np.float64]) -> NDArray[np.float64]:
    """Spearman's rank correlation of every layer's scores, ties at their mean rank; in [-1, 1].

    Where all scores of a layer are equal there is no ranking: 1 if the other has none either,
    else 0.
    """
    from scipy.stats import spearmanr  # here: importing it takes a second

    out = []
    for a, b in zip(one_LE, other_LE, strict=True):
        flat = (np.ptp(a) == 0, np.ptp(b) == 0)
        out.append(float(all(flat)) if any(flat) else float(spearmanr(a, b).statistic))
    return np.array(out)
