"""Settings of where and how a run goes, never of what it measures."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from eaft_prune.config.base import NonNegative, Positive, Settings

Seconds = Annotated[float, Field(gt=0)]
ExpertsMode = Literal["auto", "dense", "packed", "kernels"]


class EngineSettings(Settings):
    """Who evaluates the model; profiling is always transformers' affair."""

    name: str  # transformers, sglang, or module:NAME of an EngineKind
    # MXFP4 experts: dequantised once, packed until used, or by transformers' kernels from the hub
    experts: ExpertsMode = "auto"
    # of sglang: a server that runs, or an interpreter and arguments to launch one with
    base_url: Annotated[str, Field(pattern="^https?://[^/]+")] | None = None
    python: str | None = None
    args: tuple[str, ...] = ()
    env: dict[str, str] = Field(default_factory=dict)
    ready_s: Seconds = 1200.0  # until a launched server answers
    timeout_s: Seconds = 600.0  # of one request
    retries: NonNegative = 4  # after connection errors, timeouts, 429 and 5xx
    backoff_s: Seconds = 1.0  # before the first retry; doubles
    batch_blocks: Positive = 8  # of one request
    concurrency: Positive = 4  # requests in flight

    @model_validator(mode="after")
    def _one_server(self) -> EngineSettings:
        given = [name for name in ("base_url", "python") if getattr(self, name) is not None]
        if self.name == "sglang" and len(given) != 1:
            raise ValueError(
                "engine=sglang needs exactly one of engine.base_url=URL (a server that runs) and "
                "engine.python=PATH (an interpreter with sglang, to launch one)"
            )
        if self.name == "transformers" and given:
            raise ValueError(f"engine.{given[0]} is a setting of engine=sglang")
        return self


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
