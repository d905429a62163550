"""How sure a comparison is: base and candidate resampled together, block by block.

Tokens of one block depend on each other, blocks (nearly) do not, so blocks are what is drawn: with
replacement, the same draw for both models (paired block bootstrap; Efron and Tibshirani, An
Introduction to the Bootstrap, 1993, chapters 6 and 12; Koehn, EMNLP 2004, for paired test sets).
The standard deviation over draws is the standard error; bounds are the estimate -+ Student's t with
B - 1 degrees of freedom times that, which, unlike percentiles, holds for few blocks (Hesterberg,
The American Statistician 69, 2015) and for confidences that no affordable number of draws resolves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from eaft_prune.core.types import TokenScores
from eaft_prune.core.verdict import Changes, Estimate
from eaft_prune.maths.draws import Draws
from eaft_prune.maths.metrics import METRICS, Metric

LEAST_BLOCKS = 4  # the spread of fewer says nothing

Ints = NDArray[np.int64]
Values = NDArray[np.float64]


def changes(
    base: TokenScores,
    other: TokenScores,
    cc_quantile: float,
    *,
    confidence: float | None,
    resamples: int,
    seed: int,
    metrics: Sequence[Metric] = METRICS,
) -> Changes | None:
    """Candidate minus base with standard errors and bounds; None below 4 blocks or confidence None.

    Quantiles are taken anew in every draw. A distance is no draws' affair: it comes with an error
    of its own (JS2D with its jackknife's: a bootstrap repeats blocks, which doubles the bias).
    Equal token scores are changes of exactly 0 +- 0 whatever the number of blocks.
    """
    if confidence is None:
        return None
    n_blocks = len(np.unique(base.block_T))
    if _equal(base, other):
        return Changes(n_blocks, dict.fromkeys(_names(metrics), Estimate(0.0, 0.0, 0.0, 0.0)))
    if n_blocks < LEAST_BLOCKS:
        return None
    drawn_RB = np.random.default_rng(seed).multinomial(
        n_blocks, np.full(n_blocks, 1 / n_blocks), resamples
    )
    weights_RB = np.vstack([np.ones(n_blocks), drawn_RB])  # row 0: the blocks as they are
    b, o = (Draws(scores, weights_RB, cc_quantile) for scores in (base, other))
    found: dict[str, Estimate] = {}
    for metric in metrics:
        if metric.distance is not None:
            apart = metric.distance(base, other)
            bounds = _estimate(apart.value, apart.error, n_blocks, confidence)
            least = {"low": max(bounds.low, 0.0), "high": max(bounds.high, 0.0)}  # never below
            found[metric.change] = replace(bounds, **least)
            continue
        one_R, two_R = metric.drawn(b), metric.drawn(o)
        drawn = {metric.change: two_R - one_R}
        if metric.relative_limit is not None:
            drawn[metric.relative_change] = two_R / one_R - 1
        for name, change_R in drawn.items():
            error = float(np.std(change_R[1:])) * math.sqrt(n_blocks / (n_blocks - 1))
            found[name] = _estimate(float(change_R[0]), error, n_blocks, confidence)
    return Changes(n_blocks, found)


def ratio_variance(change_xB: Values, tokens_B: Ints) -> tuple[Values, Values]:
    """sum(change) / sum(tokens) over blocks, and the variance of its numerator about it, [...].

    That of the ratio estimator (Cochran, Sampling Techniques, 1977, section 6.4): the square root
    over sum(tokens) is the standard error. Changes are [..., B].
    """
    n = len(tokens_B)
    ratio_x = change_xB.sum(axis=-1) / tokens_B.sum()
    rest_xB = change_xB - ratio_x[..., None] * tokens_B
    return ratio_x, (rest_xB**2).sum(axis=-1) / (n - 1) * n


def student(probability: float, blocks: int) -> float:
    """Quantile of Student's t with blocks - 1 degrees of freedom."""
    from scipy.special import stdtrit  # here, because importing it takes a third of a second

    return float(stdtrit(blocks - 1, probability))


def _estimate(value: float, error: float, blocks: int, confidence: float) -> Estimate:
    reach = student(confidence, blocks) * error
    return Estimate(value, error, value - reach, value + reach)


def _names(metrics: Sequence[Metric]) -> list[str]:
    """Of every change: the absolute one, and the relative one where there is a limit to it."""
    both = [(m.change, None if m.relative_limit is None else m.relative_change) for m in metrics]
    return [name for names in both for name in names if name is not None]


def _equal(a: TokenScores, b: TokenScores) -> bool:
    return np.array_equal(a.logp_T, b.logp_T) and np.array_equal(a.entropy_T, b.entropy_T)
