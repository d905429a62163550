"""Settings of where and how a run goes, never of what it measures."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from eaft_prune.config.base import NonNegative, Positive, Settings

SERVERS = ("sglang", "vllm")  # engines that answer over HTTP
Seconds = Annotated[float, Field(gt=0)]
ExpertsMode = Literal["auto", "dense", "packed", "kernels"]


class EngineSettings(Settings):
    """Who evaluates the model; profiling is always transformers' affair."""

    name: str
    """transformers, sglang or vllm (servers), llamacpp, or module:NAME of an engine of your own"""
    experts: ExpertsMode = "auto"
    """MXFP4 experts: dense, packed until used, or kernels (transformers' own, from the hub)"""
    base_url: Annotated[str, Field(pattern="^https?://[^/]+")] | None = None
    """a server that runs, http://HOST:PORT; this or engine.python"""
    python: str | None = None
    """an interpreter with sglang or vllm, to launch one server a checkpoint with; or llama.cpp's"""
    args: tuple[str, ...] = ()
    """of a launched server, beside model, host and port"""
    env: dict[str, str] = Field(default_factory=dict)
    """of the launched server"""
    ready_s: Seconds = 1200.0
    """until a launched server answers"""
    timeout_s: Seconds = 600.0
    """of one request, until the last byte of its answer"""
    retries: NonNegative = 4
    """after connection errors, timeouts, 429 and 5xx"""
    backoff_s: Seconds = 1.0
    """before the first retry; doubles"""
    batch_blocks: Positive = 8
    """of one request"""
    concurrency: Positive = 4
    """requests in flight"""
    converter: str | None = None
    """llamacpp: a llama.cpp's convert_hf_to_gguf.py, which engine.python can run"""
    gguf_type: Literal["auto", "f32", "f16", "bf16", "q8_0"] = "auto"
    """llamacpp: of the converter's tensors; MXFP4 experts stay as they are"""
    pre_tokenizer: str | None = None
    """llamacpp: the one of its own (qwen2 ...) for a tokenizer that the converter does not know"""

    @model_validator(mode="after")
    def _one_server(self) -> EngineSettings:
        given = [name for name in ("base_url", "python") if getattr(self, name) is not None]
        if self.name in SERVERS and len(given) != 1:
            raise ValueError(
                f"engine={self.name} needs exactly one of engine.base_url=URL (a server that runs) "
                f"and engine.python=PATH (an interpreter with {self.name}, to launch one)"
            )
        if self.name == "llamacpp" and (self.python is None or self.converter is None):
            raise ValueError(
                "engine=llamacpp needs engine.python=PATH (an interpreter with xllamacpp, and what "
                "the converter imports) and engine.converter=PATH (convert_hf_to_gguf.py)"
            )
        if self.name == "llamacpp" and self.base_url is not None:
            raise ValueError(
                "engine.base_url: a llama.cpp server tells no log p of prompts: drop it"
            )
        if self.name == "transformers" and given:
            raise ValueError(
                f"engine.{given[0]} is a setting of engine={' and engine='.join(SERVERS)}"
            )
        return self


class GgufSettings(Settings):
    """Where task=gguf writes; `engine` says how."""

    path: str | None = None
    """file, which must not be there; null: MODEL.gguf in the run's directory"""


class TrackingSettings(Settings):
    """Where MLflow keeps the runs."""

    uri: str
    """database, directory or server of MLflow"""
    experiment: str = "eaft_prune"
    """of MLflow; verify, memo, doctor's kin ... are kept in NAME-utilities"""
    run_name: str | None = None
    """null: task, model, criterion, keep_n, seed"""
    parent_run_id: str | None = None
    """run that this one is shown under"""
    tags: dict[str, str] = Field(default_factory=dict)
    """of the run, your own"""
    register_as: str | None = None
    """name of a registered model: an exported checkpoint that passes becomes a version of it"""
    alias: str = "passed"
    """of the newest such version; task=gc keeps its checkpoint"""
    system_metrics: bool = True
    """sample CPU, memory, disk and GPU (with nvidia-ml-py) every ten seconds"""


def _device(name: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise ValueError("must be auto, cpu, cuda or cuda:N")
    return name


class RuntimeSettings(Settings):
    """Where and how fast, never what: only dtype is part of a stage key."""

    device: Annotated[str, AfterValidator(_device)] = "auto"
    """auto, cpu, cuda or cuda:N; auto: cuda if there is one, else cpu"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 on cuda, float32 on cpu"""
    batch_tokens: Positive | None = None
    """tokens a forward pass; null: 2048 on cpu, 32768 on cuda (8192 below 40 GB)"""
    threads: Positive | None = None
    """null: torch's own choice"""
    memory_gb: Annotated[float, Field(gt=0)] | None = None
    """of each GPU that weights and work may take; null: what is free"""
    store_dir: str
    """where stage outputs are kept"""
    checkpoint_dir: str
    """where pruned checkpoints are written"""
    progress: bool = True
    """show bars"""


class SweepSettings(Settings):
    """How a multirun goes about its points."""

    plan_only: bool = False
    """print what each point would have to evaluate, and stop"""
