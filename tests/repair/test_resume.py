"""A run killed between two layers goes on from the layers in the store."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from support.runs import World

pytest_plugins = ("support.worlds",)
pytestmark = pytest.mark.process

SETTINGS = (
    "task=prune", "pruning.compensation=experts", "compensation.num_blocks=80",
    "compensation.passes=3",
)  # fmt: skip


def layers(world: World) -> set[Path]:
    """Records of whole ones; a draft is none."""
    records = world.store.glob("compensate_layer/*/record.json")
    return {path for path in records if path.parent.suffix != ".draft"}


def test_killed_after_a_layer_it_keeps_that_layer_and_ends_the_same(
    world: World, tmp_path: Path
) -> None:
    whole, place = world.elsewhere(tmp_path / "whole"), world.elsewhere(tmp_path / "killed")
    want = whole.run(*SETTINGS).result["checkpoint"]
    run = place.start(*SETTINGS)
    while run.alive and not layers(place):
        time.sleep(0.001)
    assert run.kill()
    done = {path: path.stat().st_mtime_ns for path in layers(place)}
    assert done
    again = place.start(*SETTINGS)
    while again.alive and len(layers(place)) <= len(done):
        time.sleep(0.001)
    assert again.kill()
    assert {path: path.stat().st_mtime_ns for path in layers(place) & set(done)} == done
    assert place.run(*SETTINGS).result["checkpoint"]["digest"] == want["digest"]
    for store in (whole, place):
        assert layers(store) == set()
        assert list(store.store.glob("compensate_layer/*")) == []
