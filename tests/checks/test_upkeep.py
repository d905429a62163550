"""task=doctor names each fault that we make; task=gc removes what nobody needs, nothing else."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from mlflow import MlflowClient
from support import tiny
from support.runs import (
    Done,
    World,
    fresh_directory,
    process,
    rows,
    tree,
    untouched,
    write_pack,
)

from eaft_prune.checks import doctor
from eaft_prune.checks.garbage import keeps, remove, survey_store
from eaft_prune.checks.needs import Needs
from eaft_prune.core.provenance import process_tags
from eaft_prune.core.store import Store
from eaft_prune.tracking.health import check_tracking

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A random checkpoint, and two finished runs in a tracking database of their own.

    One keeps 4 experts, one all 8; the profile is both's.
    """
    home = tmp_path_factory.mktemp("upkeep")
    packs = {n: write_pack(home / f"{n}.parquet", rows(60, i)) for i, n in enumerate(("a", "b"))}
    model = tiny.write_checkpoint(home / "model")
    world = World(home, model, packs, f"sqlite:///{home}/mlflow.db")
    for settings in ((), ("pruning.keep_n=8",)):
        done = world.run(*settings)
        assert done.code == 0, done.out + done.err
    return world


@pytest.fixture
def client(small: World) -> MlflowClient:
    return MlflowClient(tracking_uri=small.uri)


def gc(world: World, *settings: str) -> Done:
    return world.run("task=gc", "gc.older_than_days=0", *settings)


def runs_of(world: World) -> list[dict[str, Any]]:
    """result.json of the two runs, in order."""
    folders = sorted(world.home.glob("cwd*"), key=lambda p: int(p.name.removeprefix("cwd")))
    found = [json.loads(p.read_text()) for f in folders for p in f.rglob("result.json")]
    return [result for result in found if result["task"] == "pipeline"][:2]


def keys(result: dict[str, Any]) -> set[str]:
    return {stage["key"] for stage in result["stages"]}


# doctor


def test_all_is_well(small: World) -> None:
    with untouched(small.store, small.checkpoints, small.model):
        done = small.run("task=doctor")
    assert done.code == 0, done.out
    assert done.result["facts"]["wrong"] == 0
    assert "everything is in order" in done.out


def test_nothing_there_yet_is_no_fault(small: World, tmp_path: Path) -> None:
    place = replace(small, home=tmp_path / "new", uri=f"sqlite:///{tmp_path}/none/mlflow.db")
    done = place.run("task=doctor")
    assert done.code == 0, done.out
    assert not (tmp_path / "none").exists()
    assert not place.store.exists()


@pytest.fixture
def patient(small: World, tmp_path: Path) -> World:
    """A copy of everything, to be broken."""
    for name in ("store", "checkpoints", "model"):
        shutil.copytree(small.home / name, tmp_path / name)
    shutil.copy(small.home / "mlflow.db", tmp_path / "mlflow.db")
    return replace(
        small, home=tmp_path, model=tmp_path / "model", uri=f"sqlite:///{tmp_path}/mlflow.db"
    )


def wrongs(done: Done) -> list[dict[str, Any]]:
    return [finding for finding in done.result["facts"]["findings"] if not finding["ok"]]


def dead_tags() -> dict[str, str]:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return {**process_tags(), "process.pid": str(process.pid), "process.started": "1.0"}


def test_every_fault_is_named_with_its_mend_and_mended_where_safe(patient: World) -> None:
    (output,) = Store(patient.store).root.glob("score/*/values.json")
    output.write_text("{}")
    draft = patient.store / "plan" / ("0" * 64 + ".draft")
    draft.mkdir()
    dead_export = patient.checkpoints / ".x.draft"
    dead_export.mkdir()
    export = next(patient.checkpoints.glob("[!.]*"))
    next(export.glob("*.safetensors")).write_bytes(b"short")
    next(patient.model.glob("*.safetensors")).unlink()
    patient.packs["a"].rename(patient.packs["a"].with_suffix(".away"))
    client = MlflowClient(tracking_uri=patient.uri)
    experiment = client.get_experiment_by_name("eaft_prune")
    assert experiment is not None
    zombie = client.create_run(experiment.experiment_id, tags=dead_tags()).info.run_id
    live = client.create_run(experiment.experiment_id, tags=process_tags()).info.run_id
    try:
        looked = patient.run("task=doctor")
        named = {finding["what"]: finding for finding in wrongs(looked)}

        def finding(*words: str) -> dict[str, Any]:
            (what,) = (w for w in named if all(word in w for word in words))
            return named[what]

        assert looked.code == 3
        assert finding(str(output.parent), "damaged")["mend"] == f"rm -r {output.parent}"
        assert finding(str(draft), "dead run")["mend"] == f"rm -r {draft}"
        assert finding(str(dead_export), "dead run")
        assert finding(str(export), "manifest")["mend"].startswith(f"mv {export} ")
        assert finding(str(patient.model), "missing")["check"] == "model"
        assert finding(str(patient.packs["a"]))["check"] == "packs"
        assert "doctor.mend=true" in finding(zombie, "RUNNING")["mend"]
        assert not [what for what in named if live in what]
        assert len(named) == 7
        assert draft.exists()
        assert client.get_run(zombie).info.status == "RUNNING"

        mended = patient.run("task=doctor", "doctor.mend=true")
        assert mended.code == 3  # what is not safe to mend is left to the user
        assert not draft.exists()
        assert not dead_export.exists()
        assert output.exists()
        assert export.exists()
        assert client.get_run(zombie).info.status == "KILLED"
        assert client.get_run(live).info.status == "RUNNING"
        assert len(wrongs(patient.run("task=doctor"))) == 4
    finally:
        patient.packs["a"].with_suffix(".away").rename(patient.packs["a"])


def test_a_draft_that_is_being_written_is_left_alone(tmp_path: Path) -> None:
    draft = tmp_path / "plan" / ("0" * 64 + ".draft")
    draft.mkdir(parents=True)
    with FileLock(draft.with_suffix(".lock")):
        found = list(doctor.check_checkpoints(tmp_path, mend=True))
        found += list(doctor.check_store(tmp_path, doctor.Bars(False), mend=True))
    assert all(finding.ok for finding in found)
    assert draft.exists()
    assert any("in use" in finding.what for finding in found)


def old_schema(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.execute("UPDATE alembic_version SET version_num = '0123456789ab'")


def garbled(path: Path) -> None:
    path.write_bytes(b"not a database at all" * 99)


@pytest.mark.parametrize(
    ("damage", "mend"), [(old_schema, "mlflow db upgrade sqlite:"), (garbled, "mv ")]
)
def test_a_database_that_cannot_be_used(
    patient: World, damage: Callable[[Path], None], mend: str
) -> None:
    damage(patient.home / "mlflow.db")
    done = patient.run("task=doctor")
    assert done.code == 3
    (finding,) = wrongs(done)
    assert finding["check"] == "tracking"
    assert finding["mend"].startswith(mend)


def test_a_database_with_a_bad_page_that_still_answers(patient: World) -> None:
    database = patient.home / "mlflow.db"
    whole = database.read_bytes()
    with sqlite3.connect(database) as connection:
        (page,) = connection.execute(
            "SELECT rootpage FROM sqlite_master WHERE name = 'index_trace_info_experiment_id"
            "_timestamp_ms'"
        ).fetchone()
    database.write_bytes(whole[: (page - 1) * 4096] + bytes(4096) + whole[page * 4096 :])
    done = patient.run("task=doctor")
    assert done.code == 3
    (finding,) = wrongs(done)
    assert finding["check"] == "tracking"
    assert "damaged" in finding["what"]
    assert finding["mend"].startswith("mv ")


def test_commands_that_mend_can_be_pasted(patient: World) -> None:
    database = patient.home / "it's a b" / "mlflow.db"
    database.parent.mkdir()
    shutil.copy(patient.home / "mlflow.db", database)
    uri = f"sqlite:///{database}"
    MlflowClient(tracking_uri=uri).create_run("0", tags=dead_tags())
    found = {one.check: one for one in check_tracking(uri, mend=False) if not one.ok}
    assert shlex.split(found["tracking"].mend)[3:] == [
        "task=doctor", "doctor.mend=true", f"tracking.uri={uri}",
    ]  # fmt: skip


def test_a_server_that_is_not_there(small: World, tmp_path: Path) -> None:
    done = replace(small, home=tmp_path, uri="http://127.0.0.1:9").run("task=doctor")
    assert done.code == 3
    assert [finding["check"] for finding in wrongs(done)] == ["tracking"]


def test_a_hub_that_cannot_be_reached(small: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    done = small.run("task=doctor", "model=gpt_oss_20b", "model.path=null")
    found = {finding["check"]: finding for finding in wrongs(done)}
    assert done.code == 3
    assert "task=predownload model=gpt_oss_20b" in found["model"]["mend"]
    assert "cannot be reached" in found["hub"]["what"]


def test_a_disk_too_small_for_the_planned_checkpoint(
    small: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(small.home)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
    (finding,) = wrongs(small.run("task=doctor"))
    assert finding["check"] == "disk"
    assert "task=gc" in finding["mend"]


def test_no_cuda_where_it_is_asked_for(small: World) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    (finding,) = wrongs(small.run("task=doctor", "runtime.device=cuda"))
    assert "runtime.device=cpu" in finding["mend"]


def test_a_check_that_breaks_is_a_finding() -> None:
    (finding,) = doctor.safely("disk", lambda: [][1])
    assert not finding.ok
    assert "IndexError" in finding.what


# gc


def unneeded(world: World) -> list[Path]:
    """What gc would remove."""
    return [Path(path) for path in gc(world).result["facts"]["paths"]]


def test_what_finished_runs_need_stays(small: World) -> None:
    assert gc(small).result["facts"]["unneeded"] == 0
    young = small.run("task=gc")  # and so does whatever is young
    assert young.result["facts"]["unneeded"] == 0


@pytest.mark.dear
def test_what_only_a_deleted_run_needed_goes_and_comes_back(
    small: World, client: MlflowClient, tmp_path: Path
) -> None:
    first, other = runs_of(small)
    shared = keys(first)
    export = Path(other["checkpoint"]["path"])
    run_id = other["mlflow_run_id"]
    client.set_terminated(run_id, "KILLED")
    assert gc(small).result["facts"]["unneeded"] >= 4
    client.set_tag(run_id, "keep", "true")
    assert gc(small).result["facts"]["unneeded"] == 0
    client.delete_tag(run_id, "keep")
    client.delete_run(run_id)
    try:
        only_other = {key for key in keys(other) - shared if list(small.store.glob(f"*/{key}"))} | {
            export.name
        }
        before = tree(small.home)
        with untouched(small.store, small.checkpoints):
            looked = gc(small)
        facts = looked.result["facts"]
        assert facts["unneeded"] == len(only_other) >= 4
        assert facts["removed"] == 0
        size = sum(
            len(data)
            for name, (_, data) in before.items()
            if any(f"/{item}/" in f"/{name}" for item in only_other)
        )
        assert facts["bytes"] == size
        assert gc(small, "gc.older_than_days=1").result["facts"]["unneeded"] == 0

        def stays(reason: str, *settings: str) -> None:
            assert gc(small, *settings).result["facts"]["unneeded"] < len(only_other), reason

        lock = tmp_path / "run.lock.yaml"
        lock.write_text(f"checkpoint: {other['checkpoint']['digest']}\n")
        stays("a lockfile names it", f"gc.lockfiles=[{tmp_path}]")

        (export / "notes.txt").write_text("mine")
        stays("it holds a file of the user's")
        (export / "notes.txt").unlink()

        config = (export / "config.json").read_bytes()
        (export / "config.json").write_bytes(config.replace(b"{", b"{ ", 1))
        stays("it was changed")
        (export / "config.json").write_bytes(config)

        small.model.rename(small.model.with_name("gone"))
        stays("its base is gone")
        small.model.with_name("gone").rename(small.model)

        pack = small.packs["b"].read_bytes()
        small.packs["b"].write_bytes(pack + b" ")  # is there, and is another
        stays("one of its packs is gone")
        small.packs["b"].write_bytes(pack)

        client.create_registered_model("best")
        client.create_model_version("best", str(export), run_id)
        client.set_registered_model_alias("best", "champion", "1")
        assert gc(small).result["facts"]["unneeded"] == 0
        client.delete_registered_model("best")

        live = client.create_run("1", tags=process_tags()).info.run_id
        refused = gc(small, "gc.delete=true")
        assert refused.code == 2
        assert live in refused.err
        client.set_terminated(live, "KILLED")
        assert export.exists()

        done = gc(small, "gc.delete=true")
        deleted = done.result["facts"]
        assert f"{other['mlflow_run_id'][:8]} (" in done.out  # who named it once
        assert not re.search("[0-9a-f]{13}", done.out.replace(export.name, ""))
        assert deleted["removed"] == len(only_other)
        assert deleted["freed"] == size
        assert not export.exists()
        manifest = json.loads(export.with_name(f"{export.name}.manifest.json").read_text())
        assert manifest["digest"] == other["checkpoint"]["digest"]
        kept = {p.name for p in small.store.glob("*/*") if p.is_dir()}
        assert kept & keys(other) == shared & keys(other)
        assert kept >= {key for key in shared if (small.store / "profile" / key).exists()}
        assert not list(small.home.rglob(".trash"))

        again = small.run().result
        assert all(stage["cached"] for stage in again["stages"])
        rebuilt = small.run("pruning.keep_n=8").result
        assert rebuilt["checkpoint"] == other["checkpoint"]
        assert rebuilt["reports"] == other["reports"]
    finally:
        client.restore_run(run_id)


@pytest.mark.dear
@pytest.mark.slow
def test_a_run_that_began_and_ended_meanwhile_keeps_what_it_used(
    small: World, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, other = runs_of(small)
    experiment = client.get_experiment_by_name("eaft_prune")
    assert experiment is not None
    gone = client.search_runs([experiment.experiment_id], "params.`pruning.keep_n` = '8'")
    for run in gone:
        client.delete_run(run.info.run_id)
    acquire, ran = FileLock.acquire, list[Done]()

    def after_a_run(lock: FileLock, *args: Any, **how: Any) -> Any:
        """gc takes its first lock after it looked, before it deletes."""
        if how.get("timeout") == 0 and not ran:
            again = [*small.arguments, "pruning.keep_n=8"]
            ran.append(process(again, fresh_directory(small.home)))
        return acquire(lock, *args, **how)

    try:
        before = unneeded(small)
        with monkeypatch.context() as patch, untouched(small.checkpoints):
            patch.setattr(FileLock, "acquire", after_a_run)
            done = gc(small, "gc.delete=true")
        assert [run.code for run in ran] == [0]
        facts = done.result["facts"]
        assert (facts["unneeded"] > 0, facts["removed"]) == (True, 0)
        assert all(path.is_dir() for path in before)
        assert small.run("pruning.keep_n=8").result["reports"] == other["reports"]
    finally:
        for run in gone:
            client.restore_run(run.info.run_id)


@pytest.mark.dear
def test_a_finished_search_keeps_what_its_trials_were_scored_by(
    small: World, client: MlflowClient
) -> None:
    done = small.run(
        "task=search",
        "search.n_trials=4",
        "search.seq_len=64",
        "search.num_blocks=8",
        "search.chunk_blocks=4",
        f"search.storage=sqlite:///{small.home}/optuna.db",
    )
    assert done.code == 0, done.err
    assert gc(small).result["facts"]["unneeded"] == 0
    run_id = done.result["mlflow_run_id"]
    client.set_terminated(run_id, "KILLED")
    evaluations = [path for path in unneeded(small) if path.parent.name == "evaluate"]
    assert len(evaluations) > 2  # more than base and winner
    client.set_terminated(run_id, "FINISHED")


def test_a_link_in_the_store_is_named_and_the_rest_goes(tmp_path: Path) -> None:
    target = tmp_path / "elsewhere"
    target.mkdir()
    store = tmp_path / "store"
    for name in ("a", "c"):
        (store / "plan" / (name * 64)).mkdir(parents=True)
    (store / "plan" / ("b" * 64)).symlink_to(target)
    (store / "score").symlink_to(store / "plan")
    items = survey_store(Store(store), 4e9)
    reasons = [keeps(item, Needs(), 0) for item in items]
    kept = [f"{item.path} {why}" for item, why in zip(items, reasons, strict=True) if why]
    assert len(items) == 6
    assert len(kept) == 4
    assert all("is a symbolic link" in why for why in kept)
    assert not any("a" * 9 in str(why) or "b" * 9 in str(why) for why in reasons)
    stayed = remove(items, lambda: lambda item: keeps(item, Needs(), 0))
    assert [why is None for why in stayed] == [why is None for why in reasons]
    assert sorted(path.name for path in (store / "plan").iterdir() if path.suffix != ".lock") == [
        "b" * 64
    ]
    assert target.is_dir()


def test_what_a_run_holds_now_is_not_removed(small: World) -> None:
    item = survey_store(Store(small.store), 4e9)[0]
    assert keeps(item, Needs(), 0) is None
    with untouched(small.store), FileLock(f"{item.path}.lock"):
        (why,) = remove([item], lambda: lambda item: None)
    assert why is not None


def test_strange_things_in_the_store_are_the_users(tmp_path: Path) -> None:
    for name in ("mine", "a" * 64):
        (tmp_path / "plan" / name).mkdir(parents=True)
        (tmp_path / "plan" / name / "notes.txt").write_text("mine")
    items = survey_store(Store(tmp_path), 4e9)
    assert len(items) == 2
    assert all(keeps(item, Needs(), 0) for item in items)


def test_without_a_tracking_store_nothing_can_be_known(small: World, tmp_path: Path) -> None:
    place = replace(small, home=tmp_path, uri=f"sqlite:///{tmp_path}/typo.db")
    shutil.copytree(small.store, place.store)
    with untouched(place.store):
        assert "tracking.uri" in gc(place, "gc.delete=true").failed()
    assert not os.path.exists(tmp_path / "typo.db")
