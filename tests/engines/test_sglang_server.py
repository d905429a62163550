"""Servers are launched, described and always stopped; the server here is a stand-in script."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import yaml
from support import tiny
from support.runs import REPOSITORY, World
from support.sglang_standin import StandIn, bigram_forward, serving

from eaft_prune.checkpoints.read import open_model
from eaft_prune.config import EngineSettings
from eaft_prune.core.types import Blocks, UserError
from eaft_prune.engines.sglang.server import SGLANG, launch
from eaft_prune.engines.sglang.serving import serve
from eaft_prune.engines.sglang.usage import recording, selections

pytest_plugins = ("support.worlds",)
pytestmark = pytest.mark.process

VERSION = "0.0.1"


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An interpreter whose `sglang.launch_server` is the stand-in."""
    home = tmp_path_factory.mktemp("other environment")
    (home / "sglang").mkdir()
    (home / "sglang" / "launch_server.py").write_text(
        "from support.sglang_standin import main\nif __name__ == '__main__': main()\n"
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
from eaft_prune.engines.sglang.server import launch
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
    assert SGLANG.version(python) == VERSION
    with pytest.raises(UserError, match="has no sglang"):
        SGLANG.version(sys.executable)
    with pytest.raises(UserError, match="cannot be run"):
        SGLANG.version("/nowhere/python")


def test_recorded_selections_are_those_of_every_token(
    python: str, checkpoint: Path, make_blocks: Callable[..., Blocks], tmp_path: Path
) -> None:
    blocks, counted = make_blocks(5, 12), np.zeros((2, 8), int)
    for token in blocks.ids_BS.ravel():
        for layer in range(2):
            for rank in range(2):
                counted[layer, (token * (layer + 1) + rank) % 8] += 1
    how = recording(settings(python), tmp_path / "records")
    served = serve(how, open_model(checkpoint), 2, 20, tmp_path / "log")
    done: list[int] = []
    found = selections(served, blocks, 2, 8, tmp_path / "records", done.append)
    assert found.tolist() == counted.tolist()
    assert sum(done) == blocks.ids_BS.size
    blind = recording(
        settings(python, "--moe-runner-backend", "triton_kernel"), tmp_path / "others"
    )
    served = serve(blind, open_model(checkpoint), 2, 20, tmp_path / "log")
    with pytest.raises(UserError, match=r"recorded \[0, 0\] selections .* instead of 120"):
        selections(served, blocks, 2, 8, tmp_path / "others", done.append)


def test_a_plan_is_cut_from_the_usage_of_a_server(python: str, world: World) -> None:
    asked = ("pruning=frequency", "pruning.core_pos_top_m=0")
    done = world.run("task=usage", "engine=sglang", f"engine.python='{python}'", *asked)
    assert done.code == 0, done.out + done.err
    file = done.result["facts"]["scores"]
    counts = [layer["count"] for layer in yaml.safe_load(Path(file).read_text())["layers"]]
    assert {sum(layer) for layer in counts} == {8 * 64 * 2}
    cut = world.run("task=profile", f"scores={file}", *asked)
    assert cut.code == 0, cut.out + cut.err
    for kept, count in zip(cut.result["plan"]["kept"], counts, strict=True):
        dropped = set(range(8)) - set(kept)
        assert min(count[j] for j in kept) >= max(count[j] for j in dropped)


def test_many_checkpoints_over_several_servers(world: World, tmp_path: Path) -> None:
    """+sweeps=served: each point asks the server that holds its checkpoint."""
    folder = tmp_path / "checkpoints"
    hosts = ("127.0.0.1", "127.0.0.2")
    with ExitStack() as stack:
        port, servers = 0, []
        for seed, host in enumerate(hosts):
            model = tiny.write_checkpoint(folder / host, seed=seed)
            server = StandIn(port, str(model), bigram_forward, host)
            servers.append(stack.enter_context(serving(server)))
            port = server.server_address[1]
        done = world.run(
            "+sweeps=served",
            f"model.path={folder}/${{model.name}}",
            f"engine.base_url=http://${{model.name}}:{port}",
            f"model.name={','.join(hosts)}",
        )
    assert done.code == 0, done.out + done.err
    assert len(done.results) == 2
    asked = [len(server.requests) for server in servers]
    assert asked[0] == asked[1] > 0


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
    (base,), (pruned,) = (done.result["reports"][m]["UNION"].values() for m in ("base", "pruned"))
    further = set(pruned) - set(base)
    assert further > {"kl_mean", "kl_p99", "top1_flips", "rms_dp"}
    assert pruned == {**base, **dict.fromkeys(further, 0.0)}
    assert not any("kl_mean" in label for label in done.result["beside"]["pruned"]["not_measured"])
    again = world.run(*arguments)
    assert all(stage["cached"] for stage in again.result["stages"])
    assert not list(again.cwd.rglob("server-*.log")), "nothing to evaluate, nothing to launch"


def test_further_engines_write_with_an_export(python: str, world: World) -> None:
    """Evaluated by transformers; SGLang, too, is shown to load and write it."""
    asked = f"export.smoke=[{{name: sglang, python: '{python}', args: [--y]}}]"
    done = world.run(asked, "eval.num_blocks=4")
    assert done.code == 0, done.out + done.err
    (found,) = done.result["facts"]["smoke"]
    assert (found["engine"], found["tokens"]) == ("sglang", 10)
    assert found["first_difference"] is not None  # the stand-in has words of its own
    (log,) = done.cwd.rglob("sglang-pruned.log")
    assert "ready" in log.read_text()
    assert "smoke/pruned/sglang" in {s["stage"] for s in done.result["stages"]}


@pytest.mark.parametrize(
    ("smoke", "said"),
    [
        ("{name: vllm, base_url: 'http://localhost:1'}", "no server serves a checkpoint"),
        ("{name: transformers}", "compared with transformers"),
        ("{name: vllm}", "needs exactly one of"),
        ("{name: sglang, pyton: p}", "pyton"),
        ("{name: sglang, python: p, args: [--ep-size, '3']}", "wants a multiple of 3"),
        ("{name: sglang, python: no-such-python}", "cannot be run"),
        ("{name: llamacp}", "did you mean"),
    ],
)
def test_engines_that_cannot_write_with_an_export_are_told_beforehand(
    world: World, smoke: str, said: str
) -> None:
    done = world.run(f"export.smoke=[{smoke}]")
    assert done.code == 2
    assert said in done.err + done.out
    if done.results:
        assert not [s for s in done.result["stages"] if s["stage"].startswith("profile")]


def test_no_export_no_smoke(python: str, world: World) -> None:
    done = world.run(f"export.smoke=[{{name: sglang, python: '{python}'}}]", "task=evaluate")
    assert "no checkpoint is exported" in done.refused()
