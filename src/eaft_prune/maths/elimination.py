"""Which experts need no further blocks for their place at a cut to be sure: pure functions.

Racing of candidates by intervals: Maron and Moore, NIPS 1993. Intervals are for the value on all B
blocks, from n of them drawn without replacement: ratio of sums with the factor 1 - n/B on its
variance (Cochran, Sampling Techniques, 1977, chapter 6).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from eaft_prune.maths.intervals import LEAST_BLOCKS, ratio_variance, student

Floats = NDArray[np.float64]


def interim_blocks(blocks: int) -> list[int]:
    """Blocks seen at each interim analysis: about 1/8, 1/4, 1/2 and all, none of fewer than 4."""
    shares = (blocks // 8, blocks // 4, blocks // 2, blocks)
    return sorted({max(count, min(LEAST_BLOCKS, blocks)) for count in shares})


def ratio_bounds(
    change_LEB: Floats, tokens_B: NDArray[np.int64], total: int, tail: float
) -> tuple[Floats, Floats]:
    """Bounds [L, E] of sum of change / sum of tokens on `total` blocks, from the first n of them.

    Each side fails with probability `tail`, as far as sums over n blocks are normal (Student's t).
    No variance counts below the median of the layer's: an expert that n blocks hardly use may
    matter to the others.
    """
    n = len(tokens_B)
    ratio_LE, variance_LE = ratio_variance(change_LEB, tokens_B)
    variance_LE = variance_LE * (1 - n / total)
    variance_LE = np.maximum(variance_LE, np.median(variance_LE, axis=1, keepdims=True))
    reach_LE = student(1 - tail, n) * np.sqrt(variance_LE) / tokens_B.sum()
    return ratio_LE - reach_LE, ratio_LE + reach_LE


def settled(low_LE: Floats, high_LE: Floats, keep_n: int) -> NDArray[np.bool_]:
    """Whether an expert is surely among the keep_n largest of its layer, or surely not.

    Kept: its lower bound is above the upper ones of E - keep_n others. Dropped: its upper bound is
    below the lower ones of keep_n others.
    """
    n_experts = low_LE.shape[1]
    above_LE = (low_LE[:, :, None] > high_LE[:, None, :]).sum(axis=2)
    below_LE = (high_LE[:, :, None] < low_LE[:, None, :]).sum(axis=2)
    return np.asarray((above_LE >= n_experts - keep_n) | (below_LE >= keep_n))


def tail_of(confidence: float, experts: int, blocks: int) -> float:
    """The chance that one bound may fail so that all hold with `confidence` (Bonferroni)."""
    return (1 - confidence) / (2 * experts * max(len(interim_blocks(blocks)) - 1, 1))
