"""Options that engines are opened with."""

from __future__ import annotations

from typing import Any

from eaft_prune.config import EngineSettings, RuntimeSettings
from eaft_prune.core.types import Blocks, KeepPlan, TokenScores
from eaft_prune.engines.base import EngineKind, EngineOptions, OnTokens, Profiler


def options(experts: str = "auto", entropy_top_k: int = 20, **runtime: Any) -> EngineOptions:
    """transformers; further arguments are settings of `runtime`."""
    engine = EngineSettings.model_validate({"name": "transformers", "experts": experts})
    settings = RuntimeSettings(store_dir="unused", checkpoint_dir="unused", **runtime)
    return EngineOptions(engine, settings, entropy_top_k)


def _unopened(*args: Any) -> Any:
    raise AssertionError("refused before it is opened")


# one that scores, and can do nothing else
SILENT = EngineKind(
    "silent", lambda options: {"engine": "silent"}, lambda options, top_k: None, _unopened
)


def evaluate_masked(
    engine: Profiler, blocks: Blocks, plan: KeepPlan, on_tokens: OnTokens
) -> TokenScores:
    """Scores of the model without the experts outside the plan."""
    with engine.masked(plan):
        return engine.score(blocks, on_tokens)
