"""PPL, the CC rate and its thresholds: pure functions of token scores.

All of them raise ValueError on nothing and on NaN: a metric of no tokens is not 0.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from eaft_prune.core.types import TokenScores
from eaft_prune.maths.divergence import Floats, check_numbers


def check_scores(scores: TokenScores, name: str) -> None:
    """Raise ValueError unless there are tokens and every p and H is a number in range."""
    if len(scores) == 0:
        raise ValueError(f"{name}: no scored tokens, so there is nothing to measure")
    if not (len(scores.logp_T) == len(scores.entropy_T) == len(scores.block_T)):
        raise ValueError(f"{name}: log p, entropy and block differ in length")
    if not np.isfinite(scores.logp_T).all() or (scores.logp_T > 1e-6).any():
        raise ValueError(f"{name}: log p holds NaN, infinite or positive values: a broken forward")
    entropy = scores.entropy_T
    if not ((entropy >= -1e-6) & (entropy <= 1 + 1e-5)).all():
        raise ValueError(f"{name}: entropy leaves [0, 1] or is NaN: a broken forward")


def perplexity(logp_T: Floats) -> float:
    """exp(mean -ln p_t); >= 1, lower is better."""
    check_numbers(logp_T)
    return math.exp(-float(np.mean(logp_T, dtype=np.float64)))


def thresholds(p_T: Floats, entropy_T: Floats, quantile: float) -> tuple[float, float]:
    """(p_q, H_q): the linear-interpolated quantiles of p and of H over the given tokens."""
    check_numbers(p_T, entropy_T)
    entropy = entropy_T.astype(np.float64)
    return float(np.quantile(p_T, quantile)), float(np.quantile(entropy, quantile))


def lowest_share(values_T: Floats, quantile: float) -> NDArray[np.float64]:
    """1 for each of the floor(q (T - 1)) + 1 lowest values, 0 for the others, [T].

    Ties at the last of them share what is left: then no rounding of equal values decides for all of
    them at once. Without ties these are the values up to np.quantile.
    """
    count = int(quantile * (len(values_T) - 1)) + 1
    last = np.partition(values_T, count - 1)[count - 1]
    below, ties = values_T < last, values_T == last
    return np.asarray(below + ties * ((count - below.sum()) / ties.sum()), np.float64)


def cc_rate(p_T: Floats, entropy_T: Floats, quantile: float) -> float:
    """Share of tokens among the q with the least p and the q with the least H, lower is better.

    These are confidently wrong: p <= p_q and H <= H_q, ties at a threshold in part.
    """
    check_numbers(p_T, entropy_T)
    improbable = lowest_share(p_T, quantile)
    return float(np.mean(improbable * lowest_share(entropy_T.astype(np.float64), quantile)))


def cc_rate_below(p_T: Floats, entropy_T: Floats, p_q: float, h_q: float) -> float:
    """Share of tokens with p <= p_q and H <= H_q, thresholds of another model; lower is better."""
    check_numbers(p_T, entropy_T)
    return float(np.mean((p_T <= p_q) & (entropy_T.astype(np.float64) <= h_q)))
