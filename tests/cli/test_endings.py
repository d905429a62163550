"""A test run that is ended leaves no process behind."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from support.runs import REPOSITORY

pytestmark = pytest.mark.process

# what a joblib multirun keeps for later: two idle worker processes
HELD = """
import os, signal
from joblib.externals.loky import get_reusable_executor

def test_it_waits():
    executor = get_reusable_executor(max_workers=2, timeout=1000)
    pids = {executor.submit(os.getpid).result() for _ in range(4)}
    print("ready", *pids, flush=True)
    signal.pause()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_ended_run_takes_its_workers_along(number: signal.Signals, tmp_path: Path) -> None:
    pytest.importorskip("joblib")
    (tmp_path / "test_held.py").write_text(HELD)
    (tmp_path / "conftest.py").write_text((REPOSITORY / "tests" / "conftest.py").read_text())
    run = subprocess.Popen(
        [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", "test_held.py"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(REPOSITORY / "tests")},
        # a shell that runs the tests in its background hands SIGINT down as ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert run.stdout is not None
    ready = next(line for line in run.stdout if "ready" in line)
    started = [psutil.Process(int(pid)) for pid in ready.split("ready")[1].split()]
    started += psutil.Process(run.pid).children(recursive=True)
    assert started
    run.send_signal(number)
    assert run.wait(60) != 0
    _, alive = psutil.wait_procs(started, timeout=20)
    assert alive == []
