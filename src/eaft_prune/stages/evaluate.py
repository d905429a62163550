"""Blocks -> log p and H of every scored token under one model."""

from __future__ import annotations

from eaft_prune.core.types import Blocks, KeepPlan, TokenScores
from eaft_prune.engines.base import OnTokens, Profiler, Scorer

VERSION = 2


def evaluate(scorer: Scorer, blocks: Blocks, on_tokens: OnTokens) -> TokenScores:
    """Score the blocks."""
    return scorer.score(blocks, on_tokens)


def evaluate_masked(
    profiler: Profiler, blocks: Blocks, mask: KeepPlan, on_tokens: OnTokens
) -> TokenScores:
    """Score the blocks with the experts outside `mask` switched off."""
    with profiler.masked(mask):
        return profiler.score(blocks, on_tokens)
