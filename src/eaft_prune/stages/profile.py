"""Blocks -> routing trace, in one forward pass."""

from __future__ import annotations

from collections.abc import Callable

from eaft_prune.core.types import Blocks, Trace
from eaft_prune.engines.base import Profiler

VERSION = 2


def profile(engine: Profiler, blocks: Blocks, on_tokens: Callable[[int], None]) -> Trace:
    """Ids, router weights and output norms at the predictor of every scored token, with p and H."""
    return engine.trace(blocks, on_tokens)
