"""Servers are launched, described and always stopped; the server here is a stand-in script."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from runs import REPOSITORY, World
from sglang_standin import bigram_forward

from eaft_prune.checkpoint import open_model
from eaft_prune.config import EngineSettings
from eaft_prune.engines.serving import serve
from eaft_prune.engines.sglang_server import launch, probe_version
from eaft_prune.types import Blocks, UserError

pytest_plugins = ("worlds",)

VERSION = "0.0.1"


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An interpreter whose `sglang.launch_server` is the stand-in."""
    home = tmp_path_factory.mktemp("other environment")
    (home / "sglang").mkdir()
    (home / "sglang" / "launch_server.py").write_text(
        "from sglang_standin import main\nif __name__ == '__main__': main()\n"
    )
    (home / f"sglang-{VERSION}.dist-info").mkdir()
    (home / f"sglang-{VERSION}.dist-info" / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: sglang\nVersion: {VERSION}\n"
    )
    script = home / "python"
    path = f"{home}:{REPOSITORY / 'tests'}:{REPOSITORY / 'src'}"
    script.write_text(f'#!/bin/sh\nPYTHONPATH="{path}" exec "{sys.executable}" "$@"\n')
    script.chmod(0o755)
    return str(script)


def settings(python: str, *args: str, **values: Any) -> EngineSettings:
    quick = {"timeout_s": 20, "retries": 1, "backoff_s": 0.001, "ready_s": 60}
    return EngineSettings(name="sglang", python=python, args=args, **{**quick, **values})


def gone(pid: int) -> bool:
    """Whether a process ends; its parent may not have asked yet."""
    try:
        psutil.Process(pid).wait(20)
    except psutil.NoSuchProcess:
        return True
    except psutil.TimeoutExpired:
        return False
    return True


def pids(process: Any) -> list[int]:
    """The lifeline and the server it runs."""
    guard = psutil.Process(process._process.pid)
    found = [guard.pid, *(child.pid for child in guard.children(recursive=True))]
    assert len(found) == 2
    return found


def test_a_launched_server_scores_and_ends_when_let_go_of(
    python: str, checkpoint: Path, make_blocks: Callable[..., Blocks], tmp_path: Path
) -> None:
    log, blocks = tmp_path / "logs" / "base.log", make_blocks(2, 12)
    how = settings(python, "--dtype", "auto", env={"STAND_IN": "yes"})
    served = serve(how, open_model(checkpoint), 2, 20, log)
    scores = served.score(blocks, lambda done: None)
    logp = [
        bigram_forward([int(blocks.ids_BS[b, t - 1])])[0, blocks.ids_BS[b, t]]
        for b, t in np.argwhere(blocks.scored_BS)
    ]
    np.testing.assert_allclose(scores.logp_T, logp, atol=1e-5)
    assert served.server.model_path == str(checkpoint)
    assert served.server.args["args"] == ["--dtype", "auto"]
    assert served.server.args["env"] == "yes"
    assert "ready" in log.read_text()
    running = pids(served.server.process)
    del served
    assert all(gone(pid) for pid in running)


def test_a_server_that_ends_tells_its_log(python: str, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"did not start: .*code 1.*\nno such kernel"):
        launch(settings(python, "--refuse"), checkpoint, tmp_path / "log")


def test_a_server_that_is_never_ready_is_stopped(
    python: str, checkpoint: Path, tmp_path: Path
) -> None:
    before = {child.pid for child in psutil.Process().children()}
    with pytest.raises(UserError, match=r"not ready within engine.ready_s = 0.5 s"):
        launch(settings(python, "--never-ready", ready_s=0.5), checkpoint, tmp_path / "log")
    assert {child.pid for child in psutil.Process().children()} <= before


def test_death_of_a_launched_server_tells_its_log(
    python: str, checkpoint: Path, make_blocks: Callable[..., Blocks], tmp_path: Path
) -> None:
    served = serve(settings(python), open_model(checkpoint), 2, 20, tmp_path / "log")
    os.kill(pids(served.server.process)[1], signal.SIGKILL)
    assert served.server.process is not None
    served.server.process._process.wait(20)
    with pytest.raises(UserError, match="the server ended with code"):
        served.score(make_blocks(1, 8), lambda done: None)


@pytest.mark.parametrize("how", ["return", "exception", "SIGINT", "SIGTERM", "SIGKILL"])
def test_no_server_outlives_its_owner(
    python: str, checkpoint: Path, tmp_path: Path, how: str
) -> None:
    code = f"""
import os, sys, signal, threading
from pathlib import Path
from eaft_prune.config import EngineSettings
from eaft_prune.engines.sglang_server import launch
if os.fork() == 0: os.execvp("sleep", ["sleep", "20"])  # a child that is no server
settings = EngineSettings(name="sglang", python={python!r}, ready_s=60)
server = launch(settings, Path({str(checkpoint)!r}), Path({str(tmp_path / "log")!r}))
print(server.process._process.pid, flush=True)
if {how!r} == "exception": raise RuntimeError
if {how!r} != "return": threading.Event().wait()
"""
    owner = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY / "src")},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler) and None,
        text=True,
    )
    assert owner.stdout is not None
    guard = psutil.Process(int(owner.stdout.readline()))
    try:
        running = [guard.pid, *(child.pid for child in guard.children(recursive=True))]
    except psutil.NoSuchProcess:
        running = [guard.pid]  # the owner was quicker
    if how.startswith("SIG"):
        assert len(running) == 2
        owner.send_signal(getattr(signal, how))
    owner.wait(20)
    assert all(gone(pid) for pid in running)


def test_the_version_is_that_of_the_other_environment(python: str) -> None:
    assert probe_version(python) == VERSION
    with pytest.raises(UserError, match="has no sglang"):
        probe_version(sys.executable)
    with pytest.raises(UserError, match="cannot be run"):
        probe_version("/nowhere/python")


def test_a_pipeline_is_evaluated_by_servers(python: str, world: World) -> None:
    """Profiled in transformers, base and pruned each on a server of its own, and gated."""
    arguments = ("engine=sglang", f"engine.python='{python}'", "engine.args=[--x]")
    done = world.run(*arguments)
    assert done.code == 0, done.out + done.err
    for model in ("base", "pruned"):
        (log,) = done.cwd.rglob(f"server-{model}.log")
        assert "ready" in log.read_text()
        saved = Path(done.result["evaluations"][model]) / "evaluation.json"
        conditions = json.loads(saved.read_text())["conditions"]
        assert conditions["engine"] == "sglang"
        assert conditions["server"]["args"] == ["--x"]
    # the stand-in says the same of every model
    assert done.result["gate"]["status"] == "PASS"
    assert done.result["reports"]["pruned"] == done.result["reports"]["base"]
    again = world.run(*arguments)
    assert all(stage["cached"] for stage in again.result["stages"])
    assert not list(again.cwd.rglob("server-*.log")), "nothing to evaluate, nothing to launch"
