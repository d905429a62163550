"""PPL, mean p, mean H, CC rate and JS2D: pure functions of token scores.

All of them raise ValueError on nothing and on NaN: a metric of no tokens is not 0.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from eaft_prune.types import PackReport, TokenScores

P_BINS = 160
H_BINS = 120

Floats = NDArray[np.floating]


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


def _check_numbers(*arrays: Floats) -> None:
    for array in arrays:
        if array.size == 0 or np.isnan(array).any():
            raise ValueError("a metric of no tokens, or of NaN, is undefined")


def perplexity(logp_T: Floats) -> float:
    """exp(mean -ln p_t); >= 1, lower is better."""
    _check_numbers(logp_T)
    return math.exp(-float(np.mean(logp_T, dtype=np.float64)))


def thresholds(p_T: Floats, entropy_T: Floats, quantile: float) -> tuple[float, float]:
    """(p_q, H_q): the linear-interpolated quantiles of p and of H over the given tokens."""
    _check_numbers(p_T, entropy_T)
    entropy = entropy_T.astype(np.float64)
    return float(np.quantile(p_T, quantile)), float(np.quantile(entropy, quantile))


def cc_rate(p_T: Floats, entropy_T: Floats, p_q: float, h_q: float) -> float:
    """Share of tokens with p <= p_q and H <= H_q: confidently wrong; lower is better."""
    _check_numbers(p_T, entropy_T)
    return float(np.mean((p_T <= p_q) & (entropy_T.astype(np.float64) <= h_q)))


def histogram2d(p_T: Floats, entropy_T: Floats) -> NDArray[np.float64]:
    """Counts [160, 120] over linear bins of p and H on [0, 1]^2; sums to T."""
    _check_numbers(p_T, entropy_T)
    entropy = np.clip(entropy_T.astype(np.float64), 0.0, 1.0)
    counts, _, _ = np.histogram2d(
        np.clip(p_T, 0.0, 1.0), entropy, bins=(P_BINS, H_BINS), range=((0.0, 1.0), (0.0, 1.0))
    )
    return counts


def js_divergence(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """JS = KL(P||M)/2 + KL(Q||M)/2 with M = (P+Q)/2 of two count arrays; nats, in [0, ln 2]."""
    if not (a.sum() > 0 and b.sum() > 0):  # NaN included
        raise ValueError("the Jensen-Shannon divergence of an empty histogram is undefined")
    p, q = a / a.sum(), b / b.sum()
    middle = (p + q) / 2

    def kl(x: NDArray[np.float64]) -> float:
        some = x > 0
        return float(np.sum(x[some] * np.log(x[some] / middle[some])))

    return min(max((kl(p) + kl(q)) / 2, 0.0), math.log(2))


def js2d(base: TokenScores, other: TokenScores) -> float:
    """JS divergence of two models' (p, H) histograms; in [0, ln 2], biased upward by about c/T."""
    return js_divergence(
        histogram2d(base.p_T, base.entropy_T), histogram2d(other.p_T, other.entropy_T)
    )


def js2d_corrected(base: TokenScores, other: TokenScores) -> float:
    """JS2D with its c/T bias removed: 2 JS(T) - mean JS of the two half-samples; may be below 0.

    Halves are the tokens of even and of odd blocks, so tokens of one block stay together. With one
    block there are no halves, and the plain value is returned.
    """
    whole = js2d(base, other)
    odd = base.block_T % 2 == 1
    if odd.all() or not odd.any():
        return whole
    halves = [
        js_divergence(
            histogram2d(base.p_T[half], base.entropy_T[half]),
            histogram2d(other.p_T[half], other.entropy_T[half]),
        )
        for half in (odd, ~odd)
    ]
    return 2 * whole - sum(halves) / 2


def pack_report(scores: TokenScores, base: TokenScores, cc_quantile: float) -> PackReport:
    """All metrics of `scores`, with `base` (the base model on the same tokens) as reference."""
    check_scores(scores, "candidate")
    check_scores(base, "base")
    if len(scores) != len(base) or not np.array_equal(scores.block_T, base.block_T):
        raise ValueError(
            f"evaluations of different tokens cannot be compared: {len(base)} and {len(scores)}"
        )
    p = scores.p_T
    return PackReport(
        ppl=perplexity(scores.logp_T),
        mean_prob=float(np.mean(p)),
        mean_entropy=float(np.mean(scores.entropy_T, dtype=np.float64)),
        cc_rate=cc_rate(p, scores.entropy_T, *thresholds(p, scores.entropy_T, cc_quantile)),
        cc_rate_base_thr=cc_rate(
            p, scores.entropy_T, *thresholds(base.p_T, base.entropy_T, cc_quantile)
        ),
        js2d=js2d(base, scores),
        js2d_corrected=js2d_corrected(base, scores),
        scored_tokens=len(scores),
        blocks=len(np.unique(scores.block_T)),
    )
