"""A checkpoint becomes a vLLM engine: served by a given server, or by one that is launched."""

from __future__ import annotations

from pathlib import Path

from eaft_prune.checkpoints.read import ModelFiles
from eaft_prune.engines.base import EngineOptions
from eaft_prune.engines.servers.memory import free_memory, vocabulary
from eaft_prune.engines.vllm.engine import VllmEngine
from eaft_prune.engines.vllm.server import connect, launch


def serve(options: EngineOptions, files: ModelFiles, top_k: int, log: Path) -> VllmEngine:
    """Connect or launch; raises UserError unless the server serves this very directory."""
    settings, vocab = options.engine, vocabulary(files, options.entropy_top_k)
    if settings.base_url is None:
        free_memory()
        server = launch(settings, files.path, log, options.most_likeliest)
    else:
        server = connect(settings, settings.base_url, files.path)
    return VllmEngine(server, settings, vocab, top_k, options.entropy_top_k)
