"""Places that this user may not write: what they hold is read, what they lack is one line.

Root may write everywhere, so the runs are those of a process that gave that up.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from support import tiny
from support.forks import Fork, fork
from support.runs import World, rows, tree, write_pack

pytestmark = pytest.mark.process

NOBODY = 65534
MASKED = ("eval.candidates=[masked]",)


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    """A directory that everybody may enter; pytest's own are root's alone."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


@pytest.fixture(scope="module")
def world(home: Path) -> World:
    """A finished run: its masked candidate is in the store."""
    packs = {n: write_pack(home / f"{n}.parquet", rows(60, i)) for i, n in enumerate("ab")}
    world = World(home, tiny.write_checkpoint(home / "model"), packs, f"sqlite:///{home}/mlflow.db")
    assert world.run(*MASKED).code == 0
    for path in (home, *home.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return world


@pytest.fixture
def cwd() -> Iterator[Path]:
    """A directory that everybody may write."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o777)
        yield Path(name)


def run(world: World, cwd: Path, *overrides: str) -> Fork:
    """A run in `cwd`, with its database there, by a user without privileges; ended."""

    def work() -> int:
        from eaft_prune.cli.main import main

        os.environ["HOME"] = str(cwd)
        if os.getuid() == 0:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        return main([*replace(world, uri=f"sqlite:///{cwd}/mlflow.db").arguments, *overrides])

    process = fork(work, cwd)
    code = process.wait()
    process.lines.append((0.0, f"exit code {code}"))
    return process


def refused(process: Fork) -> str:
    """The one line of a run that ended with exit code 2."""
    lines = process.text.splitlines()
    assert lines[-1].endswith("exit code 2"), process.text
    assert "Traceback" not in process.text
    (error,) = [line for line in lines if line.startswith("error: ")]
    return error


@pytest.fixture
def sealed(world: World) -> Iterator[Path]:
    """The store, which may only be read."""
    places = [world.store, *(path for path in world.store.rglob("*") if path.is_dir())]
    for place in places:
        place.chmod(0o555)
    yield world.store
    for place in places:
        place.chmod(0o755)


def test_a_store_that_holds_everything_is_read(world: World, sealed: Path, cwd: Path) -> None:
    before = tree(sealed)
    process = run(world, cwd, *MASKED)
    assert process.text.endswith("exit code 0"), process.text
    (file,) = (cwd / "outputs").rglob("result.json")
    result = json.loads(file.read_text())
    assert all(stage["cached"] for stage in result["stages"])
    assert result["gate"]
    assert tree(sealed) == before


def test_what_such_a_store_lacks_is_named(world: World, sealed: Path, cwd: Path) -> None:
    error = refused(run(world, cwd, *MASKED, "pruning.keep_n=8"))
    assert "runtime.store_dir" in error
    assert str(sealed) in error
    assert "cannot be written" in error


def test_an_empty_store(world: World, cwd: Path) -> None:
    store = cwd / "store"
    store.mkdir(0o555)
    error = refused(run(world, cwd, f"runtime.store_dir={store}"))
    assert "runtime.store_dir" in error
    assert "cannot be written" in error


def test_a_file_in_the_place_of_the_store(world: World, cwd: Path) -> None:
    store = cwd / "store"
    store.write_text("mine")
    error = refused(run(world, cwd, f"runtime.store_dir={store}"))
    assert str(store) in error
    assert store.read_text() == "mine"


def test_a_checkpoint_directory(world: World, cwd: Path) -> None:
    checkpoints = cwd / "checkpoints"
    checkpoints.mkdir(0o555)
    places = (f"runtime.checkpoint_dir={checkpoints}", f"runtime.store_dir={cwd}/store")
    process = run(world, cwd, *places)
    assert str(checkpoints) in refused(process)
    assert not any(line.startswith("profile") for _, line in process.lines)  # noticed before it


def test_a_working_directory(world: World, cwd: Path) -> None:
    cwd.chmod(0o555)
    error = refused(run(world, cwd))
    assert "hydra.run.dir" in error
    assert "cannot be written" in error
    assert list(cwd.iterdir()) == []


def test_a_database(world: World, cwd: Path) -> None:
    (cwd / "mlruns").mkdir(0o555)
    uri = f"tracking.uri=sqlite:///{cwd}/mlruns/mlflow.db"
    assert "tracking.uri" in refused(run(world, cwd, uri))
