"""MLflow and Optuna on one PostgreSQL server, which the test starts."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
from mlflow import MlflowClient
from support.runs import World

pytest_plugins = ("support.worlds",)
pytestmark = [pytest.mark.dear, pytest.mark.postgres, pytest.mark.slow]


def binaries() -> Path | None:
    """The newest installed server's programs: Debian keeps them out of PATH."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    path = str(found[-1]) if found else shutil.which("initdb")
    return Path(path).parent if path else None


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """URL prefix of a fresh server on loopback; databases `mlflow` and `optuna` are there."""
    pytest.importorskip("psycopg")
    programs = binaries()
    if programs is None:
        pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    # not pytest's: its directories are closed to the server's user
    with tempfile.TemporaryDirectory(prefix="postgres-") as home:
        yield from _served(programs, Path(home))


def _served(programs: Path, home: Path) -> Iterator[str]:
    user: list[str] = []
    if os.getuid() == 0:  # the server refuses root
        if shutil.which("runuser") is None or subprocess.run(["id", "postgres"]).returncode:
            pytest.skip("running as root, and there is no runuser or no user postgres")
        user = ["runuser", "-u", "postgres", "--"]
        shutil.chown(home, "postgres")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def command(*arguments: str) -> None:
        done = subprocess.run([*user, *arguments], capture_output=True, text=True, cwd="/")
        assert done.returncode == 0, done.stdout + done.stderr

    data, at = str(home / "data"), ("-h", "127.0.0.1", "-p", str(port), "-U", "postgres")
    command(str(programs / "initdb"), "-D", data, "-A", "trust", "-U", "postgres", "--no-sync")
    settings = f"-p {port} -c listen_addresses=127.0.0.1 -k {home} -c fsync=off"
    control = str(programs / "pg_ctl")
    command(control, "-D", data, "-w", "-l", str(home / "log"), "-o", settings, "start")
    try:
        for name in ("mlflow", "optuna"):
            command(str(programs / "createdb"), *at, name)
        yield f"postgresql+psycopg://postgres@127.0.0.1:{port}"
    finally:
        command(control, "-D", data, "-w", "-m", "immediate", "stop")


SEARCH = (
    "task=search",
    "search.seq_len=64",
    "search.num_blocks=4",
    "search.chunk_blocks=2",
    "pruning=random",
    "pruning.core_pos_top_m=0",
    "search.space={pruning.seed: {low: 0, high: 99}}",
)


def test_six_processes_start_at_once_and_share_one_study(
    world: World, server: str, tmp_path: Path
) -> None:
    """On databases without a table: MLflow and Optuna make theirs once, all six finish."""
    here = world.elsewhere(tmp_path, uri=f"{server}/mlflow")
    asked = (*SEARCH, f"search.storage={server}/optuna", "search.study=six", "search.n_trials=6")
    started = [here.start(*asked) for _ in range(6)]
    for process in started:
        assert process.wait() == 0, process.text
    study = optuna.load_study(study_name="six", storage=f"{server}/optuna")
    assert [t.state.name for t in study.trials] == ["COMPLETE"] * 6
    client = MlflowClient(tracking_uri=f"{server}/mlflow")
    (experiment,) = [e for e in client.search_experiments() if e.name == "eaft_prune"]
    runs = client.search_runs([experiment.experiment_id], max_results=100)
    assert {run.info.status for run in runs} == {"FINISHED"}
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert len(parents) == 6
    assert len(runs) == 6 + 6
    assert len({run.data.tags["plan.digest"] for run in parents}) == 1


def test_two_workers(world: World, server: str, tmp_path: Path) -> None:
    here = world.elsewhere(tmp_path, uri=f"{server}/mlflow")
    done = here.run(
        *SEARCH, f"search.storage={server}/optuna", "search.study=two", "search.n_trials=6",
        "search.workers=2",
    )  # fmt: skip
    assert done.code == 0, done.out + done.err
    assert done.result["facts"]["trials"] == 6
    study = optuna.load_study(study_name="two", storage=f"{server}/optuna")
    assert [t.state.name for t in study.trials] == ["COMPLETE"] * 6
    more = ("search.study=two", "search.n_trials=8")
    again = here.run(*SEARCH, f"search.storage={server}/optuna", *more)
    assert again.result["facts"]["trials_now"] == 2
