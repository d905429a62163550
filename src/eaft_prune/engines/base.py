"""What a stage asks of whoever runs the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

from eaft_prune.core.types import Blocks, KeepPlan, TokenScores, Trace

OnTokens = Callable[[int], None]  # tokens done since the last call


class Engine(Protocol):
    """A loaded model that scores tokens."""

    @property
    def conditions(self) -> Mapping[str, Any]:
        """What both sides of a comparison must have in common: engine, dtype, top_k ..."""

    def score(self, blocks: Blocks, on_tokens: OnTokens) -> TokenScores:
        """log p and H of every scored token, in block order."""

    def trace(self, blocks: Blocks, on_tokens: OnTokens) -> Trace:
        """The same, with the routing at every predictor position."""

    def masked(self, plan: KeepPlan) -> AbstractContextManager[None]:
        """Inside, experts outside the plan are never routed to."""
