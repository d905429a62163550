"""A server launched from another interpreter: waited for, and always stopped."""

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

from eaft_prune.config import EngineSettings
from eaft_prune.core.types import UserError
from eaft_prune.engines.servers import lifeline
from eaft_prune.engines.servers.http import HttpClient

_LOG_LINES = 15  # of the log, in errors
_READY_POLL_S = 0.25
_HEALTH_S = 30.0  # SGLang itself gives a health check 20


class Launched:
    """A running command; stopped when let go of, and whatever ends this process."""

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
        return "\n".join(
            [f"the server ended with code {code}; its log {self.log}:", *tail(self.log)]
        )


def tail(log: Path) -> list[str]:
    """The last lines of a log, for errors."""
    return log.read_text(errors="replace").splitlines()[-_LOG_LINES:]


def _stop(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    try:
        process.stdin.write(b"stop")
        process.stdin.close()
    except OSError:
        pass  # it has ended already
    process.wait()


@dataclass(frozen=True)
class Launcher:
    """How a kind of server is started: `PYTHON -m module MODEL_OPTION DIR --host --port ...`."""

    name: str  # for people
    packages: tuple[str, ...]  # any of which holds its version
    module: str
    model_option: str
    health: str  # the path that answers 200 once it serves

    def launch(
        self, settings: EngineSettings, model: Path, log: Path, args: Sequence[str] = ()
    ) -> tuple[HttpClient, Launched]:
        """Start it on a free port, `args` before engine.args, and wait until it answers.

        Raises UserError with the end of its log when it ends, or is not ready within
        engine.ready_s.
        """
        assert settings.python is not None, "config requires engine.python to launch"
        port = _free_port()
        command = [
            settings.python, "-m", self.module, self.model_option, str(model),
            "--host", "127.0.0.1", "--port", str(port), *args, *settings.args,
        ]  # fmt: skip
        try:
            process = Launched(command, settings.env, log)
        except OSError as error:
            raise UserError(f"engine.python = {settings.python!r} cannot be run: {error}") from None
        asker = client(settings, f"http://127.0.0.1:{port}", process)
        self._wait_until_ready(asker, process, settings.ready_s)
        return asker, process

    def version(self, python: str) -> str:
        """Its version in another interpreter, without importing it; raises UserError."""
        return probe_version(python, self.packages)

    def _wait_until_ready(self, asker: HttpClient, process: Launched, ready_s: float) -> None:
        end = time.monotonic() + ready_s
        asker = replace(asker, timeout_s=min(ready_s, _HEALTH_S))
        while time.monotonic() < end:
            if why := process.ended():
                raise UserError(f"the {self.name} server did not start: {why}")
            try:
                with asker.answer("GET", self.health, None) as response:
                    if response.status == 200:
                        return
            except (OSError, http.client.HTTPException):
                pass  # not listening yet
            time.sleep(_READY_POLL_S)
        process.stop()
        raise UserError(
            f"the {self.name} server was not ready within engine.ready_s = {ready_s:g} s; its log: "
            f"{process.log}"
        )


def client(settings: EngineSettings, base_url: str, process: Launched | None = None) -> HttpClient:
    """A client with the patience that the settings ask for."""
    return HttpClient(
        base_url,
        settings.timeout_s,
        settings.retries,
        settings.backoff_s,
        process.ended if process else lambda: None,
    )


@cache
def probe_version(python: str, packages: tuple[str, ...]) -> str:
    """Version of the first of the packages in another interpreter; raises UserError without any."""
    code = (
        "import importlib.metadata as m\n"
        f"found = {{d.name: d.version for d in m.distributions() if d.name in {packages!r}}}\n"
        "print(next(iter(found.values()), ''))"
    )
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    except OSError as error:
        raise UserError(f"engine.python = {python!r} cannot be run: {error}") from None
    if done.returncode or not done.stdout.strip():
        raise UserError(
            f"engine.python = {python!r} has no {' or '.join(packages)}: install it there, in an "
            "environment of its own"
        )
    return done.stdout.strip()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
