"""How far each conversation pulls a number: its influence values, [n], with mean 0.

d number / d weight of a row, times n: the number's change were the row's weight larger by 1/n.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from eaft_prune.core.types import TokenScores
from eaft_prune.maths.formulas import lowest_share

Ints = NDArray[np.int64]
Values = NDArray[np.float64]


def of_mean(values_T: NDArray[np.floating] | NDArray[np.bool_], row_T: Ints) -> Values:
    """Of the mean over all tokens: n sum over the row's tokens of (value - mean) / T."""
    centred = values_T - np.mean(values_T, dtype=np.float64)
    return _by_row(centred, row_T)


def of_cc_rate(scores: TokenScores, row_T: Ints, quantile: float) -> Values:
    """Of the CC rate, whose thresholds move with the row too.

    With a_t, b_t the shares in which a token is among the q with the least p and the least H, it is
    that of the mean of a_t b_t - P(b | p at p_q) a_t - P(a | H at H_q) b_t: a row with many
    improbable tokens lowers p_q, and others drop out. The two chances are read from the 2% of the
    tokens around each threshold.
    """
    p, h = scores.p_T, scores.entropy_T.astype(np.float64)
    a, b = lowest_share(p, quantile), lowest_share(h, quantile)
    pull_T = a * b - _near(p, b, quantile) * a - _near(h, a, quantile) * b
    return of_mean(pull_T, row_T)


def _near(values_T: Values, share_T: Values, quantile: float) -> float:
    """Mean share of the tokens about the quantile of the values."""
    n = len(values_T)
    centre, width = int(quantile * (n - 1)), max(n // 100, 16)
    first, end = max(centre - width, 0), min(centre + width, n)
    ends = np.partition(values_T, (first, end - 1))
    (about,) = np.nonzero((values_T >= ends[first]) & (values_T <= ends[end - 1]))
    order = about[np.argsort(values_T[about], kind="stable")]  # of these alone: a tenth of the time
    skipped = first - np.count_nonzero(values_T < ends[first])
    return float(np.mean(share_T[order[skipped : skipped + end - first]]))


def _by_row(centred_T: Values, row_T: Ints) -> Values:
    n = int(row_T.max()) + 1
    return np.asarray(np.bincount(row_T, centred_T, minlength=n) * n / len(row_T))
