"""task=memo on real runs: what it says on the terminal, and the filter that its page shows."""

from __future__ import annotations

import re
import shlex

import pytest
from support import tiny
from support.runs import REPOSITORY, World, rows, write_pack

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Three runs: the same twice, and one of a model of another name."""
    home = tmp_path_factory.mktemp("memo")
    packs = {n: write_pack(home / f"{n}.parquet", rows(60, i)) for i, n in enumerate(("a", "b"))}
    model = tiny.write_checkpoint(home / "model")
    world = World(home, model, packs, f"sqlite:///{home}/mlflow.db")
    noop = ("gate.confidence=null", "pruning.keep_n=8")
    for settings in (noop, noop, (*noop, "model.name=gpt_oss_20b")):
        assert world.run(*settings).code == 0
    return world


def test_the_recommendation_is_on_the_terminal(small: World) -> None:
    done = small.run("task=memo")
    assert done.code == 0, done.err
    (line,) = [line for line in done.out.splitlines() if line.startswith("  local ")]
    assert "keep_n = 8" in line
    assert "1 result, 2 runs, all PASS" in line
    assert done.result["facts"]["runs"] == 3


def shown() -> list[str]:
    """Every filter that is shown: in the pages as a command, in --help as its argument."""
    pages = "".join(path.read_text() for path in sorted((REPOSITORY / "docs").glob("*.md")))
    commands = re.findall(r"^python -m eaft_prune (.*memo\.filter.*)$", pages, re.MULTILINE)
    source = (REPOSITORY / "src/eaft_prune/config/upkeep.py").read_text()
    return commands + re.findall(r"'memo\.filter=[^']*'", source)


def test_the_filters_that_are_shown_can_be_pasted(small: World) -> None:
    lines = shown()
    assert len(lines) == 2
    for line in lines:
        done = small.run("task=memo", *shlex.split(line))
        assert done.code == 0, done.err
        assert done.result["facts"]["runs"] == 1
