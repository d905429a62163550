"""A few of each fault; benchmarks/faults.py does hundreds (docs/operations.md)."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from support import faults
from support.forks import Fork
from support.runs import World

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[World, Fork]:
    """An undisturbed run, and the world it ran in."""
    home = tmp_path_factory.mktemp("faults")
    world = faults.small_world(home).elsewhere(home / "whole")
    return world, faults.finish(world)


@pytest.fixture
def place(whole: tuple[World, Fork], tmp_path: Path) -> World:
    """The same inputs, an empty store."""
    return whole[0].elsewhere(tmp_path)


@pytest.fixture
def findings(whole: tuple[World, Fork]) -> dict[str, Any]:
    return faults.findings(whole[1].result)


def ends_the_same(place: World, findings: dict[str, Any]) -> Fork:
    assert faults.wrong(place) == []
    run = faults.finish(place)
    assert faults.findings(run.result) == findings
    assert faults.leftovers(place) == []
    return run


def test_kill_9_within_a_stage(
    whole: tuple[World, Fork], place: World, findings: dict[str, Any]
) -> None:
    faults.kill_within(place, "profile", 0.6 * faults.windows(whole[1])["profile"])
    ends_the_same(place, findings)


def test_a_killed_first_start_leaves_no_half_database(place: World) -> None:
    """MLflow never completes a schema that was interrupted; ours appears whole."""
    fresh = World(place.home, place.model, place.packs, f"sqlite:///{place.home}/new/mlflow.db")
    run = fresh.start("task=memo")
    draft = place.home / "new" / ".mlflow.db.draft"
    while run.alive and not draft.exists():
        pass
    assert run.kill()
    assert not (place.home / "new" / "mlflow.db").exists()
    assert faults.finish(fresh, "task=memo").result["facts"]["runs"] == 0
    assert not draft.exists()


def test_damaged_store_files_are_seen_and_made_again(
    whole: tuple[World, Fork], place: World, findings: dict[str, Any]
) -> None:
    """One file of every stage output, each damaged in another way."""
    rng = random.Random(0)
    shutil.copytree(whole[0].store, place.store)
    homes = sorted({path.parent for path in faults.files_of_store(place)})
    for number, home in enumerate(homes):
        path = rng.choice(sorted(home.iterdir()))
        faults.spoil(path, faults.DAMAGES[number % len(faults.DAMAGES)], rng)
    assert len(faults.wrong(place)) == len(homes)
    run = faults.finish(place)
    assert faults.findings(run.result) == findings
    assert {stage["cached"] for stage in run.result["stages"]} == {False}


def test_two_runs_at_once_share_the_work(place: World, findings: dict[str, Any]) -> None:
    two = [place.start(), place.start()]
    assert [run.wait() for run in two] == [0, 0]
    assert all(faults.findings(run.result) == findings for run in two)
    made = [s["key"] for run in two for s in run.result["stages"] if not s["cached"]]
    assert len(made) == len(set(made))


@pytest.mark.parametrize("stage", ["pack", "profile", "score", "evaluate"])
def test_a_store_that_is_removed_during_a_run_is_one_line(
    place: World, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_batch, removed = MlflowClient.log_batch, list[Path]()

    def and_remove(client: MlflowClient, run_id: str, *batch: Any) -> None:
        """What a stage computed is told at once, before the next one begins."""
        log_batch(client, run_id, *batch)
        if not removed and any(tag.key.startswith(f"stage.{stage}") for tag in batch[2]):
            removed.append(place.store)
            shutil.rmtree(place.store)

    monkeypatch.setattr(MlflowClient, "log_batch", and_remove)
    done = place.run()
    assert removed
    assert "removed during the run" in done.failed()
    (line,) = [line for line in done.err.splitlines() if "error" in line.lower()]
    assert line.startswith("error: runtime.store_dir = ")
    assert "Traceback" not in done.err
