"""Options of the user's own, in a directory outside the repository."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.runs import REPOSITORY, World, main

from eaft_prune.cli.main import check

pytest_plugins = ("support.worlds",)

OPTIONS = REPOSITORY / "docs" / "examples" / "options"
FLAG = (f"--config-dir={OPTIONS}",)
SEARCHED = (f"hydra.searchpath=['file://{OPTIONS}']",)


@pytest.mark.parametrize(
    "place", [FLAG, ("--config-dir", str(OPTIONS)), ("-cd", str(OPTIONS)), SEARCHED]
)
def test_every_group_takes_options_of_ones_own(place: tuple[str, ...]) -> None:
    (one,) = check([*place, "experiment=mine"]).experiments
    assert one.model.path == "models/mine"
    assert one.packs.files == {"chats": "data/chats.parquet"}
    assert (one.pruning.name, one.pruning.w_conflict, one.pruning.keep_n) == (
        "eaft_reap_calm",
        0,
        24,
    )
    assert (one.gate.name, one.eval.num_blocks) == ("mine", 64)


def test_a_sweep_of_ones_own_is_a_multirun() -> None:
    invocation = check([*FLAG, "experiment=mine", "+sweeps=mine"])
    assert invocation.multirun
    assert [one.pruning.keep_n for one in invocation.experiments] == [28, 24, 20]


@pytest.mark.parametrize("place", [FLAG, SEARCHED])
def test_a_typo_is_one_line_that_knows_them(place: tuple[str, ...], tmp_path: Path) -> None:
    line = main([*place, "experiment=mime"], tmp_path).refused()
    assert "did you mean experiment=mine?" in line
    line = main([*place, "experiment=mine", "pruning.keepn=3"], tmp_path).refused()
    assert "did you mean pruning.keep_n?" in line
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_is_ours_too_is_refused(tmp_path: Path) -> None:
    """Hydra takes the first it finds, and says nothing."""
    own = tmp_path / "own" / "pruning"
    own.mkdir(parents=True)
    (own / "reap.yaml").write_text("name: mine\n")
    line = main([f"--config-dir={own.parent}", "pruning=reap"], tmp_path).refused()
    assert "pruning = 'reap' is in" in line
    assert str(own) in line


def test_an_option_that_its_file_spells_wrong_is_one_line(tmp_path: Path) -> None:
    own = tmp_path / "own" / "experiment"
    own.mkdir(parents=True)
    (own / "x.yaml").write_text("# @package _global_\ndefaults:\n  - override /pruning: raep\n")
    line = main([f"--config-dir={own.parent}", "experiment=x"], tmp_path).refused()
    assert "pruning/raep" in line
    (own / "x.yaml").write_text("# @package _global_\npruning:\n  keepn: 3\n")
    line = main([f"--config-dir={own.parent}", "experiment=x"], tmp_path).refused()
    assert "pruning.keepn" in line


def test_checks_and_exit_codes_are_those_of_any_command_line(world: World, tmp_path: Path) -> None:
    here = world.elsewhere(tmp_path)
    limits = (
        "gate.max_dppl=0",
        "gate.max_dppl_relative=0",
        "gate.on_fail=error",
        "gate.confidence=null",
    )
    assert here.run(*FLAG, "pruning=mine", *limits).code == 3
    assert here.run(*FLAG, "model.path=/none").code == 2
    points = ("-m", "pruning.keep_n=4,3", "eval.candidates=[masked]")
    done = here.run(*FLAG, "pruning=mine", *points)
    assert done.code == 2  # 3 is no multiple of 4
    looked = here.run(*FLAG, "pruning=mine", "sweep.plan_only=true")
    assert looked.code == 0
    assert not looked.results


def test_flags_that_print_run_nothing(world: World, tmp_path: Path) -> None:
    here = world.elsewhere(tmp_path)
    done = here.run(*FLAG, "experiment=mine", "--cfg", "job", "--package", "gate")
    assert done.code == 0
    assert "max_dppl: 0.1\n" in done.out
    assert not done.results
    assert not here.store.exists()


def test_a_directory_of_the_runs_own_leaves_paths_as_they_are(world: World, tmp_path: Path) -> None:
    """With hydra.job.chdir a job's working directory is its output directory."""
    here = world.elsewhere(tmp_path)
    relative = ("runtime.store_dir=a_store", "runtime.checkpoint_dir=some_checkpoints")
    done = here.run("hydra.job.chdir=true", *relative, "tracking.uri=sqlite:///a.db")
    assert done.code == 0, done.err
    assert {"a_store", "some_checkpoints", "a.db"} <= {path.name for path in done.cwd.iterdir()}
    assert done.result["status"] == "FINISHED"
