"""Blocks -> log p and H of every scored token under one model."""

from __future__ import annotations

from collections.abc import Callable

from eaft_prune.core.types import Blocks, KeepPlan, TokenScores
from eaft_prune.engines.base import Engine

VERSION = 2


def evaluate(
    engine: Engine, blocks: Blocks, mask: KeepPlan | None, on_tokens: Callable[[int], None]
) -> TokenScores:
    """Score the blocks, with the experts outside `mask` switched off if a plan is given."""
    if mask is None:
        return engine.score(blocks, on_tokens)
    with engine.masked(mask):
        return engine.score(blocks, on_tokens)
