"""Fixtures that several test modules share: `pytest_plugins = ("support.worlds",)`."""

from __future__ import annotations

import pytest
from support import tiny
from support.runs import Done, World, fit_head, rows, write_pack

LENGTHS = ("eval.seq_lens=[32,64]", "eval.num_blocks=[120,60]", "gate.seq_lens=[32,64]")


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """8 experts, top-2, 2 layers, a fitted head; a store that tests share."""
    home = tmp_path_factory.mktemp("world")
    texts = {name: rows(60, seed) for seed, name in enumerate(("alpha", "beta", "gamma"))}
    packs = {name: write_pack(home / f"{name}.parquet", texts[name]) for name in texts}
    model = tiny.write_checkpoint(home / "model")
    fit_head(model, [text for part in texts.values() for text in part[:20]])
    return World(home, model, packs, f"sqlite:///{home}/mlruns/mlflow.db")


@pytest.fixture(scope="session")
def pipeline(world: World) -> Done:
    """A finished task=pipeline in the shared store, all packs, two lengths."""
    done = world.run("eval.packs=null", *LENGTHS)
    assert done.code == 0, done.out + done.err
    return done
