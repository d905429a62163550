"""A task is one entry: what the command line offers and what the settings need follow from it."""

from __future__ import annotations

import pytest
import yaml
from support.runs import REPOSITORY

from eaft_prune.cli.main import check
from eaft_prune.config import Experiment
from eaft_prune.config.reference import head
from eaft_prune.core.types import UserError
from eaft_prune.tasks import TASKS, task_of
from eaft_prune.tasks.task import run_name

OPTIONS = {path.stem: path for path in (REPOSITORY / "conf" / "task").glob("*.yaml")}


def test_every_task_is_an_option_and_every_option_a_task() -> None:
    named = {}
    for option, path in OPTIONS.items():
        values = yaml.safe_load(path.read_text())
        named[option] = values["task"]["name"] if "task" in values else values["name"]
    assert named == {name: name for name in TASKS}


@pytest.mark.parametrize("name", TASKS)
def test_a_task_says_what_it_is_and_what_it_needs(name: str) -> None:
    task = TASKS[name]
    assert task.help[0].isupper()
    assert task.help.endswith(".")
    assert "\n" not in task.help
    assert head(OPTIONS[name]) == task.help
    assert set(task.settings) <= set(Experiment.model_fields)
    assert bool(task.needs) == bool(task.settings)


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.settings])
def test_without_its_settings_a_task_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"task={name} needs {TASKS[name].needs[:12]}"):
        check([f"task.name={name}"])


def test_a_task_that_is_none_is_refused() -> None:
    with pytest.raises(UserError, match=r"task\.name = 'profil'; did you mean 'profile'\?"):
        check(["task.name=profil"])


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["eval.seed=3"], "demo keep28 eaft_reap seed3"),
        (["eval.seed=null", "pruning.keep_n=24"], "demo keep24 eaft_reap"),
        (["task=noise_floor", "eval.seed=3"], "noise_floor demo seed3"),
        (["task=stability"], "stability demo"),
    ],
)
def test_a_run_is_named_by_what_tells_it_apart(arguments: list[str], name: str) -> None:
    (experiment,) = check(arguments).experiments
    assert run_name(task_of(experiment), experiment) == name


@pytest.mark.parametrize(
    ("arguments", "exports"),
    [
        ([], True),
        (["eval.candidates=[masked]"], False),
        (["task=prune", "eval.candidates=[masked]"], True),
        (["task=profile"], False),
        (["task=noop"], True),
    ],
)
def test_what_writes_a_checkpoint(arguments: list[str], exports: bool) -> None:
    (experiment,) = check(arguments).experiments
    assert task_of(experiment).exports(experiment) == exports
