"""A checkpoint becomes an SGLang engine: served by a given server, or by one that is launched."""

from __future__ import annotations

from pathlib import Path

from eaft_prune.checkpoints.read import ModelFiles
from eaft_prune.config import EngineSettings
from eaft_prune.core.types import UserError
from eaft_prune.engines.servers.memory import free_memory, vocabulary
from eaft_prune.engines.sglang.engine import SglangEngine
from eaft_prune.engines.sglang.server import Server, connect, launch


def serve(
    settings: EngineSettings, files: ModelFiles, top_k: int, entropy_top_k: int, log: Path
) -> SglangEngine:
    """Connect or launch; raises UserError unless the server serves this very directory."""
    vocab = vocabulary(files, entropy_top_k)
    if settings.base_url is None:
        free_memory()
        server = launch(settings, files.path, log)
    else:
        server = connect(settings, settings.base_url)
        check_serves(server, files.path)
    return SglangEngine(server, settings, vocab, top_k, entropy_top_k)


def check_given(settings: EngineSettings, longest: int, path: Path) -> None:
    """Raise UserError where a given server does not answer, serves another model, or too little."""
    assert settings.base_url is not None, "only a given server is asked"
    server = connect(settings, settings.base_url)
    check_serves(server, path)
    if server.longest is not None and longest >= server.longest:
        raise UserError(
            f"engine.base_url = {settings.base_url!r} takes fewer than {server.longest:,} tokens a "
            f"sequence (max_req_input_len), and blocks have {longest:,}: give it more by "
            "--context-length or --mem-fraction-static, or lower eval.seq_lens"
        )


def check_serves(server: Server, path: Path) -> None:
    """Raise UserError where a given server was started with another model path."""
    if Path(server.model_path).resolve() != path.resolve():
        raise UserError(
            f"engine.base_url = {server.client.base_url!r} serves {server.model_path}, not "
            f"{path}: start it with --model-path {path}, or launch servers with engine.python"
        )
