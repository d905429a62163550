"""A checkpoint becomes a llama.cpp engine: converted to a GGUF that goes with the engine."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

from eaft_prune.checkpoints.families import family_of
from eaft_prune.checkpoints.read import ModelFiles
from eaft_prune.config import EngineSettings
from eaft_prune.core.digests import file_digest
from eaft_prune.core.types import UserError
from eaft_prune.engines.base import EngineOptions
from eaft_prune.engines.llamacpp.engine import LlamaEngine
from eaft_prune.engines.llamacpp.gguf import convert, converter
from eaft_prune.engines.llamacpp.process import Worker
from eaft_prune.engines.servers.launched import probe_version
from eaft_prune.engines.servers.memory import free_memory, vocabulary

_PACKAGES = ("xllamacpp", "llama_cpp_python")


def identity(options: EngineOptions) -> dict[str, Any]:
    """What numbers depend on beside weights and tokens; raises UserError where it is not there."""
    settings = options.engine
    return {
        "engine": "llamacpp",
        "version": probe_version(settings.python or "", _PACKAGES),
        "converter": file_digest(converter(settings)),
        "gguf_type": settings.gguf_type,
        "entropy_top_k": options.entropy_top_k,
    }


def serve(options: EngineOptions, files: ModelFiles, top_k: int, log: Path) -> LlamaEngine:
    """Convert beside the log and load; the GGUF is removed when the engine is let go of."""
    vocabulary(files, options.entropy_top_k)
    free_memory()
    gguf = log.with_suffix(".gguf")
    convert(options.engine, files, gguf, log)
    try:
        worker = opened(options.engine, files, gguf, options.runtime.threads, log)
    except BaseException:
        gguf.unlink()
        raise
    conditions = {**identity(options), "top_k": top_k}
    engine = LlamaEngine(worker, conditions, options.entropy_top_k)
    weakref.finalize(worker, gguf.unlink, missing_ok=True)
    return engine


def opened(
    settings: EngineSettings, files: ModelFiles, gguf: Path, threads: int | None, log: Path
) -> Worker:
    """A worker that holds a GGUF; raises UserError unless it has the checkpoint's experts."""
    worker = Worker(settings.python or "", gguf, threads or _cores(), settings.env, log)
    family = family_of(files.config)
    wanted = {
        "expert_count": family.n_experts(files.config),
        "expert_used_count": family.top_k(files.config),
    }
    for name, number in wanted.items():
        if worker.facts.get(name) != str(number):
            worker.stop()
            raise UserError(
                f"{gguf} has {name} = {worker.facts.get(name)}, the checkpoint {number}: does the "
                "converter know this architecture?"
            )
    return worker


def _cores() -> int:
    import os

    return len(os.sched_getaffinity(0))
