"""A checkpoint becomes an SGLang engine: served by a given server, or by one that is launched."""

from __future__ import annotations

import sys
from pathlib import Path

from eaft_prune.checkpoints.families import family_of
from eaft_prune.checkpoints.read import ModelFiles
from eaft_prune.config import EngineSettings
from eaft_prune.core.types import UserError
from eaft_prune.engines.sglang.engine import SglangEngine
from eaft_prune.engines.sglang.server import Server, connect, launch


def serve(
    settings: EngineSettings, files: ModelFiles, top_k: int, entropy_top_k: int, log: Path
) -> SglangEngine:
    """Connect or launch; raises UserError unless the server serves this very directory."""
    vocab = int(family_of(files.config).language(files.config).get("vocab_size", 0))
    if entropy_top_k > vocab:
        raise UserError(f"eval.entropy_top_k = {entropy_top_k} exceeds the vocabulary of {vocab}")
    if settings.base_url is None:
        _free_memory()
        server = launch(settings, files.path, log)
    else:
        server = connect(settings, settings.base_url)
        check_serves(server, files.path)
    return SglangEngine(
        server, vocab, top_k, entropy_top_k, settings.batch_blocks, settings.concurrency
    )


def check_serves(server: Server, path: Path) -> None:
    """Raise UserError where a given server was started with another model path."""
    if Path(server.model_path).resolve() != path.resolve():
        raise UserError(
            f"engine.base_url = {server.client.base_url!r} serves {server.model_path}, not "
            f"{path}: start it with --model-path {path}, or launch servers with engine.python"
        )


def _free_memory() -> None:
    """Give back what torch keeps of models that are no more: the server is another process."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
