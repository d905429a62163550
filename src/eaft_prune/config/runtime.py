"""Settings of where and how a run goes, never of what it measures."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from eaft_prune.config.base import Positive, Settings

ExpertsMode = Literal["auto", "dense", "packed", "kernels"]


class EngineSettings(Settings):
    """Who runs the model."""

    name: Literal["transformers"]
    # MXFP4 experts: dequantised once, packed until used, or by transformers' kernels from the hub
    experts: ExpertsMode = "auto"


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
    memory_gb: Annotated[float, Field(gt=0)] | None = None  # of the device; null: what is free
    store_dir: str
    checkpoint_dir: str
    progress: bool = True


class SweepSettings(Settings):
    """How a multirun goes about its points."""

    plan_only: bool = False  # print what each point would have to evaluate, and stop
