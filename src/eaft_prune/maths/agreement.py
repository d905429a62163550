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
    out = []
    for a, b in zip(_ranks(one_LE), _ranks(other_LE), strict=True):
        x, y = a - a.mean(), b - b.mean()
        size = np.sqrt((x**2).sum() * (y**2).sum())
        out.append((x * y).sum() / size if size else float(np.array_equal(a, b)))
    return np.array(out)


def _ranks(values_LE: NDArray[np.float64]) -> NDArray[np.float64]:
    below = (values_LE[:, None, :] < values_LE[:, :, None]).sum(axis=2)
    equal = (values_LE[:, None, :] == values_LE[:, :, None]).sum(axis=2)
    ranks: NDArray[np.float64] = below + (equal - 1) / 2.0
    return ranks
