"""Options that engines are opened with."""

from __future__ import annotations

from typing import Any

from eaft_prune.config import EngineSettings, RuntimeSettings
from eaft_prune.engines.base import EngineOptions


def options(experts: str = "auto", entropy_top_k: int = 20, **runtime: Any) -> EngineOptions:
    """transformers; further arguments are settings of `runtime`."""
    engine = EngineSettings.model_validate({"name": "transformers", "experts": experts})
    settings = RuntimeSettings(store_dir="unused", checkpoint_dir="unused", **runtime)
    return EngineOptions(engine, settings, entropy_top_k)
