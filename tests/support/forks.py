"""A process that has imported everything: a fork of this one, with its output in a pipe.

A new Python imports for six seconds before it does anything; here hundreds of runs are affordable.
Give each its own database: SQLite forbids a connection to be carried over a fork.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

IMPORTS = (
    "eaft_prune.cli.launch",
    "eaft_prune.engines.transformers",
    "eaft_prune.tracking.server",
    "mlflow.store.tracking.sqlalchemy_store",
    "transformers.models.gpt_oss.modeling_gpt_oss",
    "plotly.graph_objects",
)


@dataclass
class Fork:
    """A forked process, and the lines it printed with their times."""

    pid: int
    cwd: Path
    output: Any  # its stdout and stderr
    started: float
    lines: list[tuple[float, str]] = field(default_factory=list)

    @property
    def alive(self) -> bool:
        flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return os.waitid(os.P_PID, self.pid, flags) is None

    def until(self, *prefixes: str) -> bool:
        """Read up to a line that begins so; False if the process ended before."""
        for line in self.output:
            self.lines.append((time.monotonic() - self.started, line))
            if line.startswith(prefixes):
                return True
        return False

    def reach(self, *prefixes: str) -> None:
        """Read up to a line that begins so, which must come."""
        assert self.until(*prefixes), f"no line {prefixes} in:\n{self.text}"

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> bool:
        """kill -9; False if it had ended."""
        self.send(signal.SIGKILL)
        return self.wait() == -signal.SIGKILL

    def wait(self) -> int:
        """Exit code, negative for a signal."""
        self.until("\0")
        self.output.close()
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    @property
    def text(self) -> str:
        return "".join(line for _, line in self.lines)

    @property
    def result(self) -> dict[str, Any]:
        """The one result.json it left."""
        (path,) = self.cwd.rglob("result.json")
        found = json.loads(path.read_text())
        assert isinstance(found, dict)
        return found


def fork(work: Callable[[], int], cwd: Path) -> Fork:
    """Begin `work` in `cwd` in another process; what it returns is the exit code."""
    for name in IMPORTS:
        importlib.import_module(name)
    reader, writer = os.pipe()
    sys.stdout.flush()
    started = time.monotonic()
    pid = os.fork()
    if pid:
        os.close(writer)
        return Fork(pid, cwd, os.fdopen(reader, errors="replace"), started)
    code = 1
    try:
        # a shell that runs the tests in its background hands SIGINT down as ignored
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.dup2(writer, 1)
        os.dup2(writer, 2)
        sys.stdout = os.fdopen(1, "w", buffering=1)
        sys.stderr = os.fdopen(2, "w", buffering=1)
        os.chdir(cwd)
        code = work()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)
