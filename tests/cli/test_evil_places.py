"""Directories whose names are anything but plain: everything lies in them, and nothing beside."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from mlflow import MlflowClient
from support import tiny
from support.runs import QUICK, main, rows, write_pack

from eaft_prune.tracking.address import resolve

pytestmark = pytest.mark.process

# one in the other: what is odd in any of them is odd in the whole path
EVIL = "feature%2Flogin/a%20b/what?/back\\slash/a b/ü/#x/a;b&c=d/it's"
# model, packs, store, checkpoints, outputs, database and study: all where the command is typed
HERE = (
    "model=local",
    "model.path=model",
    "packs=local",
    "packs.files={a: a.parquet, b: b.parquet}",
    *QUICK,
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("inputs")
    tiny.write_checkpoint(home / "model")
    for seed, name in enumerate("ab"):
        write_pack(home / f"{name}.parquet", rows(60, seed))
    return home


@pytest.fixture
def parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "parent").mkdir()
    return tmp_path / "parent"


def nothing_beside(home: Path, parent: Path) -> bool:
    """Whether each directory from the parent down holds the next one alone."""
    between = [home, *home.parents][: len(home.relative_to(parent).parts)]
    return all(list(place.parent.iterdir()) == [place] for place in between)


def test_a_run_stays_in_its_directory(
    inputs: Path, parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = shutil.copytree(inputs, parent / EVIL)
    done = main(HERE, home)
    assert done.code == 0, done.err
    assert nothing_beside(home, parent)
    assert {path.name for path in home.iterdir()} == {
        "a.parquet", "b.parquet", "model", "store", "checkpoints", "outputs", "mlruns",
    }  # fmt: skip
    (run_folder,) = (home / "mlruns" / "artifacts").glob("*/artifacts/report.html")
    assert run_folder.stat().st_size > 1000
    monkeypatch.chdir(home)
    client = MlflowClient(tracking_uri=resolve("sqlite:///mlruns/mlflow.db")[0])
    run = client.get_run(done.result["mlflow_run_id"])
    assert run.info.status == "FINISHED"
    assert any(file.path == "report.html" for file in client.list_artifacts(run.info.run_id))
    cared = main([*HERE, "task=gc", "gc.older_than_days=0"], home)
    assert cared.code == 0, cared.err
    assert "0 items" in cared.out
    assert main([*HERE, "task=doctor"], home).code == 0


@pytest.mark.slow
def test_a_search_and_a_multirun_stay_in_their_directory(inputs: Path, parent: Path) -> None:
    home = shutil.copytree(inputs, parent / EVIL)
    small = ("search.n_trials=2", "search.seq_len=64", "search.num_blocks=4")
    for arguments in (("task=search", *small), ("-m", "pruning.keep_n=4,8")):
        done = main([*HERE, *arguments], home)
        assert done.code == 0, done.err
    assert nothing_beside(home, parent)


def test_what_hydra_would_interpolate_is_one_line(inputs: Path, parent: Path) -> None:
    home = shutil.copytree(inputs, parent / "${x}")
    assert "interpolation" in main(HERE, home).refused()
    assert not (home / "outputs").exists()
