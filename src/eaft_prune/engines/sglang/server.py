"""An SGLang server: given, or launched from another interpreter and always stopped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from eaft_prune.config import EngineSettings
from eaft_prune.core.foreign import json_in
from eaft_prune.core.text import shortened
from eaft_prune.core.types import UserError
from eaft_prune.engines.servers.http import HttpClient
from eaft_prune.engines.servers.launched import Launched, Launcher, client

SGLANG = Launcher("SGLang", ("sglang",), "sglang.launch_server", "--model-path", "/health_generate")

# what differs between two servers of the same kind, or says nothing of the numbers
_NOT_COMPARED = (
    "model_path", "tokenizer_path", "served_model_name", "launch_command", "startup_time",
    "internal_states", "kv_events", "version", "status", "host", "port", "nccl_port", "grpc_port",
    "dist_init_addr", "random_seed", "api_key", "admin_api_key", "engine_info_bootstrap_port",
    # what is left of the memory depends on the size of the weights
    "max_total_num_tokens", "max_req_input_len", "max_running_requests", "weight_version",
)  # fmt: skip
_NOT_COMPARED_PREFIXES = ("log_", "_", "ssl_", "disaggregation_", "crash_dump", "watchdog")


@dataclass(frozen=True)
class Server:
    """A server that answers, and what it says of itself."""

    client: HttpClient
    model_path: str
    version: str
    args: Mapping[str, Any]  # normalised: equal on both sides of a comparison
    capacity: int | None  # tokens of all sequences it holds at once
    memory_gb: float | None  # weights, KV cache and graphs of the first rank
    longest: int | None = None  # tokens of a request must be fewer
    process: Launched | None = None

    @property
    def overrides(self) -> dict[str, Any]:
        """What the server was told to read differently in config.json."""
        text = self.args.get("json_model_override_args") or "{}"
        if isinstance(text, str):
            text = json_in(text.encode(), "the server's json_model_override_args is not JSON")
        return dict(text)


def launch(settings: EngineSettings, model: Path, log: Path) -> Server:
    """A server of a checkpoint, started with engine.python; raises UserError as Launcher does."""
    asker, process = SGLANG.launch(settings, model, log)
    return _described(asker, process)


def connect(settings: EngineSettings, base_url: str) -> Server:
    """A given server; raises UserError where none answers."""
    asker = client(settings, base_url.rstrip("/"))
    # one that is not there is told at once
    return replace(_described(replace(asker, retries=0), None), client=asker)


def normalised(info: Mapping[str, Any]) -> dict[str, Any]:
    """A server's own account of itself without what must differ between two servers."""
    return {
        key: value
        for key, value in sorted(info.items())
        if key not in _NOT_COMPARED and not key.startswith(_NOT_COMPARED_PREFIXES)
    }


def _described(asker: HttpClient, process: Launched | None) -> Server:
    model, info = asker.get("/get_model_info"), asker.get("/get_server_info")
    try:
        path, version = str(model["model_path"]), str(info["version"])
        capacity, memory = _whole(info.get("max_total_num_tokens")), _memory_gb(info)
        longest = _whole(info.get("max_req_input_len"))
        args = normalised(info)
        server = Server(asker, path, version, args, capacity, memory, longest, process)
        _whole(server.overrides.get("num_experts_per_tok"))
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        why = f"{type(error).__name__}: {shortened(str(error), 200)}"
        raise UserError(
            f"{asker.base_url} does not say its model_path and version, or what it says of itself "
            f"makes no sense ({why}): is it an SGLang server of version 0.5 or later?"
        ) from None
    return server


def _whole(value: Any) -> int | None:
    """An integer or nothing; raises ValueError."""
    if value is not None and type(value) is not int:
        raise ValueError(f"{shortened(repr(value))} is no integer")
    return value


def _memory_gb(info: Mapping[str, Any]) -> float | None:
    states = info.get("internal_states") or [{}]
    usage = states[0].get("memory_usage")
    if usage is None:
        return None
    graphs = usage.get("graph", 0.0)
    parts = graphs.values() if isinstance(graphs, Mapping) else [graphs]
    return float(usage["weight"] + usage["kvcache"] + sum(parts))
