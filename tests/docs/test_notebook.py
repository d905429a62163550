"""notebooks/quickstart.ipynb runs on a tiny model, and what is committed of it was run."""

from __future__ import annotations

import contextlib
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from support.runs import REPOSITORY, World, fresh_directory

import eaft_prune

pytest_plugins = ("support.worlds",)

NOTEBOOK = REPOSITORY / "notebooks/quickstart.ipynb"
SMALL = (
    "eval.kl_top_k=null",
    "eval.num_blocks=all",
    "eval.seed=0",
    "pruning.core_pos_top_m=0",
    "pruning.keep_multiple=2",
    "gate.max_dppl=1000",
    "gate.max_dppl_relative=10",
    "gate.max_dcc_rate=1",
    "gate.max_dmean_prob=1",
    "gate.max_js2d=1",
)
FRONTIER = ("frontier.ladder=[ranking]", "frontier.num_blocks=60")


@pytest.fixture(scope="module")
def done(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """The notebook's outputs, and where it ran."""
    own = world.elsewhere(tmp_path_factory.mktemp("notebook"))
    given = {"SETTINGS": [*own.arguments, *SMALL], "FRONTIER": FRONTIER, "SIZES": [6, 4]}
    cwd = fresh_directory(own.home)
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(cwd):
        patch.syspath_prepend(REPOSITORY / "tools")
        notebook = importlib.import_module("notebook")
        return notebook.executed(json.loads(NOTEBOOK.read_text()), given), cwd


def shown(notebook: dict[str, Any]) -> list[str]:
    """The kinds of what code cells show."""
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return [",".join(sorted(o.get("data", {"printed": 0}))) for c in cells for o in c["outputs"]]


def test_it_runs_and_the_committed_outputs_are_of_the_same_kinds(
    done: tuple[dict[str, Any], Path],
) -> None:
    committed = json.loads(NOTEBOOK.read_text())
    assert shown(committed) == shown(done[0])
    assert len(shown(committed)) == 7
    assert "/home/" not in NOTEBOOK.read_text()
    assert "/tmp/" not in NOTEBOOK.read_text()
    sources = [cell["source"] for cell in done[0]["cells"]]
    assert sources == [cell["source"] for cell in committed["cells"]]


def test_results_are_what_the_files_say(done: tuple[dict[str, Any], Path]) -> None:
    files = sorted(done[1].glob("outputs/*/*/result.json"))
    found = eaft_prune.load_results(done[1] / "outputs")
    values = [json.loads(file.read_text()) for file in files]
    assert [one.values for one in found] == values
    frame = found.frame()
    assert list(frame.verdict) == [value["gate"]["status"] for value in values]
    assert list(frame.keep_n) == [len(value["plan"]["kept"][0]) for value in values]
    for one, value in zip(found, values, strict=True):
        changes = next(iter(value["changes"].values()))["UNION"]["64"]["dppl_relative"]["value"]
        assert one.growth() == pytest.approx(changes)
        assert len(one.checks()) == len(value["gate"]["checks"])
        assert set(one.reports().model) == set(value["reports"])
    pruned = found.where(lambda one: one.task == "pipeline")
    assert [len(of) for of in found.by(lambda one: one.task).values()] == [len(pruned), 1]
    (frontier,) = found.where(lambda one: one.task == "frontier")
    assert frontier.frontier().rows.isin(["search", "proof"]).all()
    with pytest.raises(eaft_prune.UserError, match="task=pipeline"):
        pruned[0].frontier()


def test_mistakes_and_failed_runs_are_raised(world: World, tmp_path: Path) -> None:
    with pytest.raises(eaft_prune.UserError, match=r"did you mean pruning\.keep_n"):
        eaft_prune.run(*world.arguments, pruning__keepn=4)
    with pytest.raises(eaft_prune.UserError, match="call it in a loop"):
        eaft_prune.run(*world.arguments, "-m", "pruning.keep_n=4,8")
    with contextlib.chdir(tmp_path), pytest.raises(eaft_prune.RunFailed, match="keep_n") as error:
        eaft_prune.run(*world.arguments, out=tmp_path / "here", pruning__keep_n=12)
    assert error.value.result.path == tmp_path / "here"
    assert error.value.result.exit_code == 2
    with pytest.raises(eaft_prune.UserError, match="missing"):
        eaft_prune.load_result(tmp_path)
