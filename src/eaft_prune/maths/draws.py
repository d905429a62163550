"""One model's scored tokens, drawn again block by block."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from eaft_prune.core.types import TokenScores

Floats = NDArray[np.floating]
Ints = NDArray[np.int64]
Values = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Draws:
    """T scored tokens of one model, and how often each of R draws holds each of their B blocks."""

    scores: TokenScores
    weights_RB: Values
    cc_quantile: float  # q of p_q and H_q

    @staticmethod
    def once(scores: TokenScores, cc_quantile: float) -> Draws:
        """One draw: every block as it is."""
        return Draws(scores, np.ones((1, len(np.unique(scores.block_T)))), cc_quantile)

    @cached_property
    def p_T(self) -> Values:
        return self.scores.p_T

    @cached_property
    def logp_T(self) -> Values:
        return self.scores.logp_T.astype(np.float64)

    @cached_property
    def entropy_T(self) -> Values:
        return self.scores.entropy_T.astype(np.float64)

    @cached_property
    def block_T(self) -> Ints:
        """Index of every token's block into B."""
        return np.asarray(np.unique(self.scores.block_T, return_inverse=True)[1], np.int64)

    @cached_property
    def tokens_R(self) -> Values:
        return np.asarray(self.weights_RB @ np.bincount(self.block_T))

    def mean(self, values_T: NDArray[np.float64] | NDArray[np.bool_]) -> Values:
        """Mean of one value a token, [R]; of bools the share that is true."""
        return np.asarray(self.weights_RB @ np.bincount(self.block_T, values_T) / self.tokens_R)

    def quantile(self, values_T: Values, quantile: float) -> Values:
        """Linear-interpolated quantile of one value a token, [R]; see `weighted_quantile`."""
        return weighted_quantile(values_T, self.block_T, self.weights_RB, quantile)


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
