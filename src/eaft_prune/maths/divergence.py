"""JS2D: how far two models' (p, H) histograms are apart, and that without its sampling bias.

The plain divergence of two samples is biased upward, because every bin's counts differ by chance.
All functions raise ValueError on nothing and on NaN.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eaft_prune.core.types import TokenScores

P_BINS = 160
H_BINS = 120
_CELLS = P_BINS * H_BINS
_COARSE = 8  # bins a side that share one estimate of how unlike the two models are there
_MOST_ALONE = 0.5  # of the tokens may share their bin with no other, or nothing is known

Floats = NDArray[np.floating]
Ints = NDArray[np.int64]


def check_numbers(*arrays: Floats) -> None:
    """Raise ValueError on an empty array or NaN."""
    for array in arrays:
        if array.size == 0 or np.isnan(array).any():
            raise ValueError("a metric of no tokens, or of NaN, is undefined")


def cells(p_T: Floats, entropy_T: Floats) -> Ints:
    """Flat index [T] of each token's bin, p first, 160 x 120 linear bins on [0, 1]^2."""
    check_numbers(p_T, entropy_T)
    return _bin(p_T, P_BINS) * H_BINS + _bin(entropy_T.astype(np.float64), H_BINS)


def _bin(values_T: Floats, bins: int) -> Ints:
    """Which of the bins between `linspace` edges each value is in; five times a binary search."""
    edges = np.linspace(0.0, 1.0, bins + 1)
    near = np.clip((values_T * bins).astype(np.int64), 0, bins - 1)
    near += values_T >= edges[near + 1]  # the product may round to the other side of an edge
    near -= values_T < edges[near]
    return np.clip(near, 0, bins - 1)


def histogram2d(p_T: Floats, entropy_T: Floats) -> NDArray[np.float64]:
    """Counts [160, 120] over linear bins of p and H on [0, 1]^2; sums to T."""
    return _counts(cells(p_T, entropy_T))


def _counts(cell_T: Ints) -> NDArray[np.float64]:
    counts = np.bincount(cell_T, minlength=_CELLS)
    return counts.reshape(P_BINS, H_BINS).astype(np.float64)


def js_divergence(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """JS = KL(P||M)/2 + KL(Q||M)/2 with M = (P+Q)/2 of two count arrays; nats, in [0, ln 2]."""
    if not (a.sum() > 0 and b.sum() > 0):  # NaN included
        raise ValueError("the Jensen-Shannon divergence of an empty histogram is undefined")
    # not scipy's jensenshannon or rel_entr: their last bits differ, and so would reports and locks
    p, q = a / a.sum(), b / b.sum()
    middle = (p + q) / 2

    def kl(x: NDArray[np.float64]) -> float:
        some = x > 0
        return float(np.sum(x[some] * np.log(x[some] / middle[some])))

    return min(max((kl(p) + kl(q)) / 2, 0.0), math.log(2))


def js2d(base: TokenScores, other: TokenScores) -> float:
    """JS divergence of two models' (p, H) histograms; in [0, ln 2], biased upward."""
    return js_divergence(
        histogram2d(base.p_T, base.entropy_T), histogram2d(other.p_T, other.entropy_T)
    )


@dataclass(frozen=True)
class Apart:
    """How far two models are apart, and how far each row pulls that, [n]; None: not known."""

    value: float
    influence_n: NDArray[np.float64] | None
    plain: float | None = None  # of the numbers as they are, where `value` is rid of a bias


def js2d_corrected(base: TokenScores, other: TokenScores, row_T: Ints) -> Apart:
    """JS2D estimated from pairs of different rows; unbiased about 0, so it may be negative.

    With p_i, q_i the two histograms and delta_i = (p_i - q_i) / (p_i + q_i),

        JS = sum_i phi(delta_i) (p_i - q_i)^2 / (4 (p_i + q_i)),
        phi(x) = ((1 + x) ln(1 + x) + (1 - x) ln(1 - x)) / x^2, from 1 (x = 0) to 2 ln 2 (x = 1).

    The bias sits in (p_i - q_i)^2: a bin's chance differences are squared. With d_ib base minus
    candidate tokens of row b in bin i and N_i the tokens of both models there, it is replaced by
    products of different rows, whose chance differences are independent:

        n / (n - 1) / (4 T) * sum_i phi_i ((sum_b d_ib)^2 - sum_b d_ib^2) / (N_i - 1).

    N_i - 1, since with Poisson counts of mean m, E[N (N - 1) / (N - 1)] = m (1 - exp(-m)). The lost
    exp(-m) is the chance that a token is alone in its bin, in no pair: the sum is divided by one
    minus their share (Good, Biometrika 40, 1953). phi_i is read from neighbourhoods of 8 x 8 bins;
    it is within 1.1% of 1 where delta < 0.25. The influence holds both and leaves out one row at a
    time (jackknife), which for products of pairs errs on the large side, by up to sqrt(2) (Efron
    and Stein, Annals of Statistics 9, 1981). It is not known below 3 rows, nor where more than half
    of the tokens are alone: no pairs is ignorance. One row has no pairs: the plain value then. The
    sum over different rows is the U-statistic of Gretton et al., JMLR 13 (2012).
    """
    ids, row_T = np.unique(row_T, return_inverse=True)
    n_rows, tokens = len(ids), len(base)
    mine, theirs = cells(base.p_T, base.entropy_T), cells(other.p_T, other.entropy_T)
    plain = js_divergence(_counts(mine), _counts(theirs))
    if n_rows < 2:
        return Apart(plain, None, plain)
    # one entry per (row, cell) that either model has tokens in
    entry = np.concatenate([row_T * _CELLS + mine, row_T * _CELLS + theirs])
    occupied, inverse = np.unique(entry, return_inverse=True)
    sign = np.repeat([1.0, -1.0], tokens)
    d, n = np.bincount(inverse, sign), np.bincount(inverse)
    cell, row = occupied % _CELLS, occupied // _CELLS
    d_i, dd_i, n_i = (np.bincount(cell, x, minlength=_CELLS) for x in (d, d * d, n))
    alone = np.count_nonzero(n_i == 1) / (2 * tokens)
    phi: NDArray[np.float64] = _phi(mine, theirs) / max(1 - alone, 1 / tokens)
    term: Floats = phi * _ratio(d_i * d_i - dd_i, n_i - 1)
    total = float(term.sum())
    value = n_rows / (n_rows - 1) * total / (4 * tokens)
    if n_rows < 3 or alone > _MOST_ALONE:
        return Apart(value, None, plain)
    rest = d_i[cell] - d  # of the cell, without this row
    without = phi[cell] * _ratio(rest * rest - (dd_i[cell] - d * d), n_i[cell] - n - 1)
    total_n = total + np.bincount(row, without - term[cell], minlength=n_rows)
    tokens_n = tokens - np.bincount(row_T, minlength=n_rows)
    value_n = (n_rows - 1) / (n_rows - 2) * total_n / (4 * tokens_n)
    return Apart(value, (n_rows - 1) * (value_n.mean() - value_n), plain)


def _ratio(top: NDArray[Any], bottom: NDArray[Any]) -> NDArray[np.float64]:
    """top / bottom, 0 where bottom is not positive: a single token is in no pair."""
    return np.where(bottom > 0, top / np.maximum(bottom, 1.0), 0.0)


def _phi(mine: Ints, theirs: Ints) -> NDArray[np.float64]:
    """phi(delta) per bin, delta taken over its neighbourhood."""
    every = np.arange(_CELLS)
    coarse = every // H_BINS // _COARSE * (H_BINS // _COARSE) + every % H_BINS // _COARSE
    size = int(coarse.max()) + 1
    a, b = (np.bincount(coarse[x], minlength=size) for x in (mine, theirs))
    x = np.clip(np.abs(a - b) / np.maximum(a + b, 1), 1e-4, 1 - 1e-12)
    phi = ((1 + x) * np.log1p(x) + (1 - x) * np.log1p(-x)) / (x * x)
    return np.asarray(phi[coarse])
