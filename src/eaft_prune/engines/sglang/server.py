"""An SGLang server: given, or launched from another interpreter and always stopped."""

from __future__ import annotations

import http.client
import os
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from eaft_prune.config import EngineSettings
from eaft_prune.core.foreign import json_in
from eaft_prune.core.text import shortened
from eaft_prune.core.types import UserError
from eaft_prune.engines.sglang import lifeline
from eaft_prune.engines.sglang.http import HttpClient

_LOG_LINES = 15  # of the log, in errors
_READY_POLL_S = 0.25
_HEALTH_S = 30.0  # SGLang itself gives a health check 20

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
    process: Launched | None = None

    @property
    def overrides(self) -> dict[str, Any]:
        """What the server was told to read differently in config.json."""
        text = self.args.get("json_model_override_args") or "{}"
        if isinstance(text, str):
            text = json_in(text.encode(), "the server's json_model_override_args is not JSON")
        return dict(text)


class Launched:
    """A running `sglang.launch_server`; stopped when let go of, and whatever ends this process."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log
        with log.open("ab") as out:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", lifeline.__file__, *command],
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=out,
                env={**os.environ, **env},
                start_new_session=True,  # Ctrl-C is ours to act on
            )
        self.stop = weakref.finalize(self, _stop, self._process)

    def ended(self) -> str | None:
        """Why it runs no more, with the end of its log; None while it runs."""
        code = self._process.poll()
        if code is None:
            return None
        lines = self.log.read_text(errors="replace").splitlines()[-_LOG_LINES:]
        return "\n".join([f"the server ended with code {code}; its log {self.log}:", *lines])


def _stop(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    try:
        process.stdin.write(b"stop")
        process.stdin.close()
    except OSError:
        pass  # it has ended already
    process.wait()


def launch(settings: EngineSettings, model: Path, log: Path) -> Server:
    """Start `engine.python -m sglang.launch_server` on a free port and wait until it answers.

    Raises UserError with the end of its log when it ends, or is not ready within engine.ready_s.
    """
    assert settings.python is not None, "config requires engine.python to launch"
    port = _free_port()
    command = [
        settings.python, "-m", "sglang.launch_server", "--model-path", str(model),
        "--host", "127.0.0.1", "--port", str(port), *settings.args,
    ]  # fmt: skip
    try:
        process = Launched(command, settings.env, log)
        asker = client(settings, f"http://127.0.0.1:{port}", process)
        _wait_until_ready(asker, process, settings.ready_s)
        return _described(asker, process)
    except OSError as error:
        raise UserError(f"engine.python = {settings.python!r} cannot be run: {error}") from None


def connect(settings: EngineSettings, base_url: str) -> Server:
    """A given server; raises UserError where none answers."""
    return _described(client(settings, base_url.rstrip("/")), None)


@cache
def probe_version(python: str) -> str:
    """Version of sglang in another interpreter, without importing it."""
    code = "import importlib.metadata as m; print(m.version('sglang'))"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    except OSError as error:
        raise UserError(f"engine.python = {python!r} cannot be run: {error}") from None
    if done.returncode:
        raise UserError(
            f"engine.python = {python!r} has no sglang: install it there, in an environment of its "
            "own"
        )
    return done.stdout.strip()


def normalised(info: Mapping[str, Any]) -> dict[str, Any]:
    """A server's own account of itself without what must differ between two servers."""
    return {
        key: value
        for key, value in sorted(info.items())
        if key not in _NOT_COMPARED and not key.startswith(_NOT_COMPARED_PREFIXES)
    }


def client(settings: EngineSettings, base_url: str, process: Launched | None = None) -> HttpClient:
    """A client with the patience that the settings ask for."""
    return HttpClient(
        base_url,
        settings.timeout_s,
        settings.retries,
        settings.backoff_s,
        process.ended if process else lambda: None,
    )


def _described(asker: HttpClient, process: Launched | None) -> Server:
    model, info = asker.get("/get_model_info"), asker.get("/get_server_info")
    try:
        path, version = str(model["model_path"]), str(info["version"])
        capacity, memory = _whole(info.get("max_total_num_tokens")), _memory_gb(info)
        server = Server(asker, path, version, normalised(info), capacity, memory, process)
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


def _wait_until_ready(asker: HttpClient, process: Launched, ready_s: float) -> None:
    end = time.monotonic() + ready_s
    asker = replace(asker, timeout_s=min(ready_s, _HEALTH_S))
    while time.monotonic() < end:
        if why := process.ended():
            raise UserError(f"the SGLang server did not start: {why}")
        try:
            with asker.answer("GET", "/health_generate", None) as response:
                if response.status == 200:
                    return
        except (OSError, http.client.HTTPException):
            pass  # not listening yet
        time.sleep(_READY_POLL_S)
    process.stop()
    raise UserError(
        f"the SGLang server was not ready within engine.ready_s = {ready_s:g} s; its log: "
        f"{process.log}"
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
