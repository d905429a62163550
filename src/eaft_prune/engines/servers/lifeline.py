"""Runs a command that ends with its owner: `lifeline.py COMMAND ...`, stdin the owner's pipe.

Whatever ends the owner (return, exception, SIGINT, SIGKILL) closes the pipe; the command and all it
started are then asked to stop (SIGTERM), and killed if they do not within some seconds. Standard
library only: it runs by path, outside the package.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time

GRACE_S = 10.0
_POLL_S = 0.2


def main(command: list[str]) -> int:
    """Exit code of the command, which leads a process group of its own."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the pipe decides
    owner = os.getppid()
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_default_signals
    )
    # a forked child of the owner may hold the pipe open: look at the parent as well
    while process.poll() is None and os.getppid() == owner:
        if select.select([sys.stdin], [], [], _POLL_S)[0]:
            break
    _stop(process)
    return process.returncode


def _stop(process: subprocess.Popen[bytes]) -> None:
    _signal(process.pid, signal.SIGTERM)
    end = time.monotonic() + GRACE_S
    while time.monotonic() < end and process.poll() is None:
        time.sleep(0.02)
    _signal(process.pid, signal.SIGKILL)  # the rest of the group, too
    process.wait()


def _signal(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def _default_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
