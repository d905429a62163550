"""Settings of where and how a run goes, never of what it measures."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from eaft_prune.config.base import Positive, Settings


class EngineSettings(Settings):
    name: Literal["transformers"]


class TrackingSettings(Settings):
    """Where MLflow keeps the runs."""

    uri: str
    experiment: str
    run_name: str | None = None
    parent_run_id: str | None = None
    tags: dict[str, str] = Field(default_factory=dict)


class RuntimeSettings(Settings):
    """Where and how fast, never what: only dtype is part of a stage key."""

    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    batch_tokens: Positive | None = None
    threads: Positive | None = None
    store_dir: str
    checkpoint_dir: str
    progress: bool = True


class SweepSettings(Settings):
    """How a multirun goes about its points."""

    plan_only: bool = False  # print what each point would have to evaluate, and stop
