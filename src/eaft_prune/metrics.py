"""PPL, mean p, mean H and CC rate, and the report of all metrics: pure functions of token scores.

All of them raise ValueError on nothing and on NaN: a metric of no tokens is not 0.
"""

from __future__ import annotations

import math

import numpy as np

from eaft_prune.divergence import Floats, check_numbers, js2d, js2d_corrected
from eaft_prune.types import PackReport, TokenScores


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


def cc_rate(p_T: Floats, entropy_T: Floats, p_q: float, h_q: float) -> float:
    """Share of tokens with p <= p_q and H <= H_q: confidently wrong; lower is better."""
    check_numbers(p_T, entropy_T)
    return float(np.mean((p_T <= p_q) & (entropy_T.astype(np.float64) <= h_q)))


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
        js2d_corrected=js2d_corrected(base, scores).value,
        scored_tokens=len(scores),
        blocks=len(np.unique(scores.block_T)),
    )
