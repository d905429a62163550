"""A multirun's points as jobs of a real Slurm: no accounting, one node, two processors."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient
from support import slurm
from support.runs import Done, World

pytest_plugins = ("support.worlds",)
pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.process]

THREE = (
    "eval.candidates=[masked]",
    "pruning=random",
    "pruning.core_pos_top_m=0",
    "-m",
    "pruning.seed=0,1,2",
)
LAUNCHER = (
    "hydra/launcher=eaft_slurm",
    "hydra.launcher.cpus_per_task=1",
    "hydra.launcher.mem_gb=1",
)


@pytest.fixture(scope="module")
def queue(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, str]]:
    pytest.importorskip("submitit", reason="pip install 'eaft_prune[slurm]'")
    if why := slurm.missing():
        pytest.skip(why)
    environment: dict[str, str] = {}
    with slurm.cluster(tmp_path_factory.mktemp("slurm"), cpus=2) as found:
        environment |= found
        before = {name: os.environ.get(name) for name in found}
        os.environ.update(found)
        yield found
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@pytest.fixture
def held(queue: Mapping[str, str]) -> Iterator[None]:
    """The node takes no new jobs: what is submitted stays pending."""
    slurm.ask(queue, "scontrol", "update", "PartitionName=all", "State=DOWN")
    yield
    release(queue)


def release(queue: Mapping[str, str]) -> None:
    slurm.ask(queue, "scontrol", "update", "PartitionName=all", "State=UP")


@pytest.fixture
def own(world: World, queue: Mapping[str, str], tmp_path: Path) -> World:
    """The shared model and packs, a store and a tracker of this test's."""
    home = tmp_path / "world"
    home.mkdir()
    return world.elsewhere(home, uri=f"sqlite:///{tmp_path}/mlruns/mlflow.db")


def rows(cwd: Path) -> list[dict[str, str]]:
    (path,) = [p for p in cwd.rglob("summary.csv") if "artifacts" not in p.parts]
    with path.open() as file:
        return list(csv.DictReader(file))


def ids(cwd: Path) -> dict[int, str]:
    """Slurm's id of every point."""
    (path,) = cwd.rglob("queue.json")
    return {int(number): job["id"] for number, job in json.loads(path.read_text()).items()}


def parent(world: World) -> Any:
    runs = MlflowClient(tracking_uri=world.uri).search_runs(["1"], "tags.task = 'multirun'")
    return runs[0]  # the latest


def findings(done: Done) -> list[dict[str, Any]]:
    parts = ("job", "status", "gate", "plan", "reports", "digests")
    return [{part: result[part] for part in parts} for result in done.results]


def test_three_points_are_what_one_process_finds(own: World, tmp_path: Path) -> None:
    serial = own.run(*THREE)
    assert serial.code == 0, serial.out + serial.err
    there = own.elsewhere(tmp_path / "there")
    queued = there.run(*THREE, *LAUNCHER)
    assert queued.code == 0, queued.out + queued.err
    assert findings(queued) == findings(serial)
    columns = ("overrides", "status", "verdict", "ΔPPL %", "plan", "exit code")
    for one, other in zip(rows(queued.cwd), rows(serial.cwd), strict=True):
        assert [one[name] for name in columns] == [other[name] for name in columns]
    assert parent(own).info.status == "FINISHED"


def test_a_running_and_a_pending_job_cancelled(own: World, queue: Mapping[str, str]) -> None:
    """One is stopped while it works, one before it starts; the third is waited for."""
    process = own.start(*THREE, *LAUNCHER, "hydra.launcher.array_parallelism=1")
    process.reach("#2 Slurm job")
    numbers = ids_when_there(process.cwd)
    until_it_works(own, process.cwd, 0)
    assert slurm.ask(queue, "scancel", numbers[0], numbers[1]) == ""
    code = process.wait()
    assert code != 0
    table = rows(process.cwd)
    assert [row["status"] for row in table] == ["CANCELLED", "CANCELLED", "FINISHED"], process.text
    assert f"Slurm job {numbers[0]}: CANCELLED" in table[0]["error"]
    assert f"Slurm job {numbers[1]}: WITHDRAWN" in table[1]["error"]
    assert parent(own).info.status == "FAILED"
    again = own.run(*THREE, *LAUNCHER)
    assert again.code == 0, again.out + again.err
    assert [row["status"] for row in rows(again.cwd)] == ["FINISHED"] * 3


@pytest.mark.parametrize("fate", ["leave", "cancel"])
def test_the_waiting_command_ended(
    own: World, queue: Mapping[str, str], held: None, fate: str
) -> None:
    """SIGTERM: a table, a parent run that ended, and jobs that go on or are cancelled as asked."""
    process = own.start(*THREE, *LAUNCHER, f"hydra.launcher.when_stopped={fate}")
    process.reach("#2 Slurm job")
    numbers = ids_when_there(process.cwd)
    process.send(signal.SIGTERM)
    assert process.wait() == 143, process.text
    wanted = "STILL RUNNING" if fate == "leave" else "CANCELLED"
    assert [row["status"] for row in rows(process.cwd)] == [wanted] * 3, process.text
    assert f"scancel {' '.join(numbers.values())}" in process.text
    assert parent(own).info.status == "KILLED"
    states = slurm.ask(queue, "squeue", "-h", "-r", "-t", "pending", "-o", "%i").split()
    assert sorted(states) == (sorted(numbers.values()) if fate == "leave" else [])
    release(queue)
    done = own.run(*THREE, *LAUNCHER)  # the same command resumes
    assert done.code == 0, done.out + done.err
    assert [row["status"] for row in rows(done.cwd)] == ["FINISHED"] * 3


def test_a_killed_job_and_a_refused_submission(own: World, queue: Mapping[str, str]) -> None:
    process = own.start(*THREE, *LAUNCHER, "hydra.launcher.array_parallelism=1")
    process.reach("#2 Slurm job")
    psutil.Process(until_it_works(own, process.cwd, 0)).kill()
    process.wait()
    table = rows(process.cwd)
    assert [row["status"] for row in table] == ["FAILED", "FINISHED", "FINISHED"], process.text
    assert ": FAILED, log " in table[0]["error"]
    refused = own.run(*THREE, *LAUNCHER, "hydra.launcher.partition=nowhere")
    assert refused.code != 0
    assert "hydra/launcher=eaft_slurm: not submitted" in refused.err
    assert "invalid partition specified: nowhere" in refused.err
    assert {row["status"] for row in rows(refused.cwd)} == {"LOST"}


def ids_when_there(cwd: Path) -> dict[int, str]:
    """The ids, once the launcher has written them down."""
    for _ in range(100):
        if list(cwd.rglob("queue.json")):
            return ids(cwd)
        subprocess.run(["sleep", "0.1"], check=True)
    raise AssertionError("no queue.json")


def until_it_works(world: World, cwd: Path, job: int) -> int:
    """Wait for a point's MLflow run; returns the process of its job."""
    client = MlflowClient(tracking_uri=world.uri)
    for _ in range(600):
        runs = client.search_runs(["1"], "attributes.status = 'RUNNING'")
        for run in runs:
            if run.data.tags.get("run_dir", "").endswith(f"/{job}"):
                return int(run.data.tags["process.pid"])
        subprocess.run(["sleep", "0.1"], check=True)
    raise AssertionError(f"job {job} never began")
