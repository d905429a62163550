"""Servers, given or launched, as decoders for task=decode_bench."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from eaft_prune.config import EngineSettings
from eaft_prune.engines.decoding import Api, HttpDecoder
from eaft_prune.engines.servers.launched import client
from eaft_prune.engines.servers.openai import capacity, models
from eaft_prune.engines.sglang import server as sglang
from eaft_prune.engines.vllm import server as vllm


def given(settings: EngineSettings, url: str, api: Api) -> HttpDecoder:
    """A server that runs; raises UserError where none answers."""
    if api == "sglang":
        return _of_sglang(sglang.connect(settings, url))
    asker = client(settings, url.rstrip("/"))
    held = capacity(asker)
    facts = {"engine": "openai", "capacity_tokens": held}
    return HttpDecoder(asker, "openai", facts, held, models(asker)[0].name)


@contextmanager
def launched(settings: EngineSettings, model: Path, log: Path) -> Iterator[HttpDecoder]:
    """A server of a checkpoint by engine.name, stopped behind the block."""
    server: sglang.Server | vllm.Server
    if settings.name == "sglang":
        server = sglang.launch(settings, model, log)
        decoder = _of_sglang(server)
    else:
        server = vllm.launch(settings, model, log)
        held = server.capacity
        facts = {
            "engine": "vllm",
            "version": server.version,
            "capacity_tokens": held,
            "args": list(settings.args),
        }
        decoder = HttpDecoder(server.client, "openai", facts, held, server.model.name)
    try:
        yield decoder
    finally:
        assert server.process is not None, "it was launched"
        server.process.stop()


def _of_sglang(server: sglang.Server) -> HttpDecoder:
    facts = {
        "engine": "sglang",
        "version": server.version,
        "capacity_tokens": server.capacity,
        "memory_gb": server.memory_gb,
        "args": dict(server.args),
    }
    return HttpDecoder(server.client, "sglang", facts, server.capacity)
