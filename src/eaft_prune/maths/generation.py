"""What is counted of what a model wrote, and of two models that wrote after the same prompts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from eaft_prune.core.generation import Flips
from eaft_prune.core.verdict import Estimate
from eaft_prune.maths.intervals import of_influence

LONGEST_UNIT = 128  # tokens
REPEATS = 4
SHORTEST_LOOP = 32  # tokens: a rule of dashes or a table's head is none

Bools = NDArray[np.bool_]
Values = NDArray[np.float64]


def loops(ids: Sequence[int]) -> bool:
    """Whether somewhere a unit of 1 to 128 tokens stands 4 times in a row, over 32 tokens or more.

    That is: ids[t] == ids[t - u] for max(3 u, 32 - u) tokens t in a row, u the unit's length.
    """
    written = np.asarray(ids)
    for unit in range(1, min(LONGEST_UNIT, len(written) // REPEATS) + 1):
        same = written[unit:] == written[:-unit]
        if _longest_run(same) >= max((REPEATS - 1) * unit, SHORTEST_LOOP - unit):
            return True
    return False


def _longest_run(same: Bools) -> int:
    breaks = np.flatnonzero(~same)
    edges = np.concatenate([[-1], breaks, [len(same)]])
    return int(np.diff(edges).max()) - 1


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Tokens that both begin with; None where they are equal."""
    if list(a) == list(b):
        return None
    shared = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        shared += 1
    return shared


def change(base_P: Values, other_P: Values, confidence: float, *, equal: bool) -> Estimate:
    """Mean over prompts of a paired difference of shares, with bounds over prompts.

    A share that changed nowhere among P prompts may change in what P may hold none of: bounds are
    never nearer than that, unless the two wrote the same everywhere.
    """
    d = np.asarray(other_P - base_P, np.float64)
    if len(d) < 2 or equal:
        return Estimate(float(d.mean()), 0.0, float(d.mean()), float(d.mean()))
    return of_influence(float(d.mean()), d - d.mean(), confidence, 1.0)


def ratio(base_P: Values, other_P: Values, confidence: float) -> Estimate:
    """Mean of other over mean of base, paired; 1 if equal."""
    b, o = float(base_P.mean()), float(other_P.mean())
    value = o / max(b, 1e-12)
    influence = (other_P - o - value * (base_P - b)) / max(b, 1e-12)
    if len(base_P) < 2:
        return Estimate(value, 0.0, value, value)
    return of_influence(value, influence, confidence)


def recovery(base_S: Values, other_S: Values, confidence: float, *, equal: bool) -> Estimate:
    """Mean of other over mean of base less 1, paired over samples, with bounds as of `change`."""
    b, o = float(base_S.mean()), float(other_S.mean())
    value = o / b - 1
    if len(base_S) < 2 or equal:
        return Estimate(value, 0.0, value, value)
    influence = (other_S - o - o / b * (base_S - b)) / b
    return of_influence(value, influence, confidence, 1.0 / b)


def flips(base_P: Bools, other_P: Bools) -> Flips:
    """Counts of the four cases, and McNemar's exact two-sided p (Psychometrika 12, 1947).

    Under no difference each discordant prompt is as likely the one as the other: p is twice the
    binomial tail of the rarer, at most 1.
    """
    from scipy.stats import binomtest  # here, because importing it takes a third of a second

    lost, gained = int(np.sum(base_P & ~other_P)), int(np.sum(~base_P & other_P))
    p = 1.0 if lost + gained == 0 else float(binomtest(lost, lost + gained).pvalue)
    return Flips(int(np.sum(base_P & other_P)), lost, gained, int(np.sum(~base_P & ~other_P)), p)
