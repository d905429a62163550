"""When a trial may stop: its loss is above the best's, beyond what the blocks so far leave open."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from eaft_prune.core.types import KeepPlan
from eaft_prune.maths.intervals import LEAST_BLOCKS, ratio_variance, student
from eaft_prune.search.problem import Problem, chunk_losses


def behind(
    problem: Problem, plan: KeepPlan, best: KeepPlan, chunks_done: int, confidence: float
) -> bool:
    """Whether the plan's loss is above the best's with this confidence, on the blocks so far.

    The blocks are the same for both, so their losses are compared in pairs.
    """
    pairs = [
        (chunk_losses(problem, plan, chunk), chunk_losses(problem, best, chunk))
        for chunk in problem.chunks[:chunks_done]
    ]
    change_B = np.concatenate([mine.nll_B - theirs.nll_B for mine, theirs in pairs])
    tokens_B = np.concatenate([mine.tokens_B for mine, _ in pairs])
    return above_zero(change_B, tokens_B, confidence)


def above_zero(
    change_B: NDArray[np.float64], tokens_B: NDArray[np.int64], confidence: float
) -> bool:
    """Whether d = sum(change) / sum(tokens) exceeds 0 with this one-sided confidence over blocks.

    The ratio estimator's standard error and a one-sided Student interval; never on fewer than 4
    blocks.
    """
    n = len(change_B)
    if n < LEAST_BLOCKS:
        return False
    mean, variance = ratio_variance(change_B, tokens_B)
    return bool(mean > student(confidence, n) * np.sqrt(variance) / tokens_B.sum())
