"""Which tokens a model predicted well, badly, or confidently wrong: pure functions of p and H."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from eaft_prune.maths.formulas import thresholds

REGIONS = ("good", "uncertain", "conflict")


def regions(
    p_T: NDArray[np.float64],
    entropy_T: NDArray[np.float32],
    kind: Literal["strict", "policy"],
    quantile: float,
    high_quantile: float,
) -> NDArray[np.int8]:
    """Region of every token as an index into `REGIONS`.

    strict: good = p >= p_q and H <= H_q; conflict = p < p_q and H <= H_q; uncertain = the rest.
    policy: conflict = p <= p_q and H <= H_q; uncertain = p <= p_q and H >= H_hi; good = the rest.
    Thresholds are quantiles over the given tokens.
    """
    p_q, h_q = thresholds(p_T, entropy_T, quantile)
    entropy = entropy_T.astype(np.float64)
    if kind == "strict":
        sure = entropy <= h_q
        return np.where(sure, np.where(p_T >= p_q, 0, 2), 1).astype(np.int8)
    _, h_hi = thresholds(p_T, entropy_T, high_quantile)
    wrong = p_T <= p_q
    region = np.zeros(len(p_T), np.int8)
    region[wrong & (entropy >= h_hi)] = 1
    region[wrong & (entropy <= h_q)] = 2
    return region


def soft_regions(
    p_T: NDArray[np.float64], entropy_T: NDArray[np.float32], quantile: float, width: float
) -> NDArray[np.float64]:
    """Share of every token in each of `REGIONS`, [T, 3]; rows sum to 1.

    good = a b, conflict = a (1 - b), uncertain = 1 - a with b = sigmoid(d_p / width) and
    a = sigmoid(d_H / width). d_p is the token's rank by p less the number of tokens below p_q, over
    T; d_H the number of tokens up to H_q less its rank by H, over T; a rank is that of the middle
    of ties plus a half, so neither is 0. width -> 0 gives `strict`.
    """
    p_q, h_q = thresholds(p_T, entropy_T, quantile)
    entropy = entropy_T.astype(np.float64)
    n = len(p_T)
    right = _sigmoid((_middle_rank(p_T) - np.sum(p_T < p_q)) / n / width)
    sure = _sigmoid((np.sum(entropy <= h_q) - _middle_rank(entropy)) / n / width)
    return np.stack([sure * right, 1.0 - sure, sure * (1.0 - right)], axis=1)


def _middle_rank(values_T: NDArray[np.float64]) -> NDArray[np.float64]:
    """Tokens below, plus half of those equal: k + 1/2 for the k-th of distinct values."""
    from scipy.stats import rankdata  # here: importing it takes a second

    return np.asarray(rankdata(values_T) - 0.5)


def _sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    # not scipy's expit: its last bits differ, and stored scores are these
    with np.errstate(over="ignore"):  # exp -> inf is a share of exactly 0
        return 1.0 / (1.0 + np.exp(-x))
