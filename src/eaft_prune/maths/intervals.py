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
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from eaft_prune.config import GateSettings
from eaft_prune.core.types import Changes, Estimate, TokenScores
from eaft_prune.maths.divergence import js2d_corrected

LEAST_BLOCKS = 4  # the spread of fewer says nothing

Floats = NDArray[np.floating]
Ints = NDArray[np.int64]
Values = NDArray[np.float64]


def changes(
    base: TokenScores, other: TokenScores, cc_quantile: float, settings: GateSettings
) -> Changes | None:
    """Candidate minus base with standard errors and bounds; None below 4 blocks or by settings.

    CC thresholds are taken anew in every draw. JS2D is the bias-corrected one with its jackknife
    error: a bootstrap repeats blocks, which doubles the bias. Equal token scores are changes of
    exactly 0 +- 0 whatever the number of blocks.
    """
    if settings.confidence is None:
        return None
    ids, block_T = np.unique(base.block_T, return_inverse=True)
    n_blocks = len(ids)
    if _equal(base, other):
        none = Estimate(0.0, 0.0, 0.0, 0.0)
        return Changes(n_blocks, none, none, none, none, none, none, none)
    if n_blocks < LEAST_BLOCKS:
        return None
    rng = np.random.default_rng(settings.bootstrap_seed)
    drawn_RB = rng.multinomial(n_blocks, np.full(n_blocks, 1 / n_blocks), settings.resamples)
    weights_RB = np.vstack([np.ones(n_blocks), drawn_RB])  # row 0: the blocks as they are
    b, o = (_values(scores, block_T, weights_RB, cc_quantile) for scores in (base, other))
    ppl = [np.exp(side["nll"]) for side in (b, o)]

    def estimate(change_R: Floats) -> Estimate:
        error = float(np.std(change_R[1:])) * math.sqrt(n_blocks / (n_blocks - 1))
        return _estimate(float(change_R[0]), error, n_blocks, settings.confidence)

    divergence = js2d_corrected(base, other)
    js2d = _estimate(divergence.value, divergence.error, n_blocks, settings.confidence)
    return Changes(
        blocks=n_blocks,
        dppl=estimate(ppl[1] - ppl[0]),
        dppl_relative=estimate(ppl[1] / ppl[0] - 1),
        dnll=estimate(o["nll"] - b["nll"]),
        dcc_rate=estimate(o["cc"] - b["cc"]),
        dmean_prob=estimate(o["p"] - b["p"]),
        dmean_entropy=estimate(o["h"] - b["h"]),
        js2d=replace(js2d, low=max(js2d.low, 0.0), high=max(js2d.high, 0.0)),  # it is never below
    )


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


def _estimate(value: float, error: float, blocks: int, confidence: float | None) -> Estimate:
    assert confidence is not None, "there are no bounds without a confidence"
    reach = student(confidence, blocks) * error
    return Estimate(value, error, value - reach, value + reach)


def _equal(a: TokenScores, b: TokenScores) -> bool:
    return np.array_equal(a.logp_T, b.logp_T) and np.array_equal(a.entropy_T, b.entropy_T)


def _values(
    scores: TokenScores, block_T: Ints, weights_RB: Floats, cc_quantile: float
) -> dict[str, Floats]:
    """Mean NLL, p and H, and the CC rate of every draw."""
    p, h = scores.p_T, scores.entropy_T.astype(np.float64)
    tokens_R = weights_RB @ np.bincount(block_T)
    means = {
        name: weights_RB @ np.bincount(block_T, values) / tokens_R
        for name, values in (("nll", -scores.logp_T.astype(np.float64)), ("p", p), ("h", h))
    }
    p_q, h_q = (weighted_quantile(x, block_T, weights_RB, cc_quantile) for x in (p, h))
    near = np.flatnonzero((p <= p_q.max()) & (h <= h_q.max()))  # no other token can conflict
    hits_R = np.zeros(len(weights_RB))
    for part in np.array_split(near, len(near) // 2048 + 1):  # bounds the memory
        hit = (p[part] <= p_q[:, None]) & (h[part] <= h_q[:, None])
        hits_R += np.sum(hit * weights_RB[:, block_T[part]], axis=1)
    return {**means, "cc": hits_R / tokens_R}


def weighted_quantile(
    values_T: Floats, block_T: Ints, weights_RB: Floats, quantile: float
) -> NDArray[np.float64]:
    """Per draw R the linear-interpolated quantile of values whose blocks count weights times.

    Equals np.quantile over the repeated values. Values are sorted once and cut into about sqrt(T)
    runs: a product of draws and per-block run counts finds the run, a sum inside it the value.
    """
    order = np.argsort(values_T, kind="stable")
    ordered, block = values_T[order].astype(np.float64), block_T[order]
    size = math.isqrt(len(ordered)) + 1
    n_runs = -(-len(ordered) // size)
    run = np.arange(len(ordered)) // size
    n_blocks = weights_RB.shape[1]
    counts = np.bincount(block * n_runs + run, minlength=n_blocks * n_runs)
    upto = np.cumsum(weights_RB @ counts.reshape(n_blocks, n_runs), axis=1)
    position = quantile * (upto[:, -1] - 1)
    padded = np.append(np.arange(len(ordered)), np.zeros(n_runs * size - len(ordered), np.int64))
    members, real = padded.reshape(n_runs, size), np.arange(n_runs * size).reshape(n_runs, size)

    def at(rank_R: Floats) -> NDArray[np.float64]:
        """The value with rank_R smaller ones before it."""
        home = np.argmax(upto > rank_R[:, None], axis=1)
        before = np.where(home > 0, upto[np.arange(len(home)), home - 1], 0.0)
        index = members[home]
        weight = np.take_along_axis(weights_RB, block[index], axis=1)
        weight = np.where(real[home] < len(ordered), weight, 0.0)
        inside = np.argmax(before[:, None] + np.cumsum(weight, axis=1) > rank_R[:, None], axis=1)
        return np.asarray(ordered[index[np.arange(len(index)), inside]])

    low = np.floor(position)
    lower, upper = at(low), at(np.minimum(low + 1, upto[:, -1] - 1))
    return np.asarray(lower + (upper - lower) * (position - low))
