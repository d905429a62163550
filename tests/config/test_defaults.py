"""A setting has one default, and files that have settings under older names are read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.runs import REPOSITORY

from eaft_prune.cli.main import check
from eaft_prune.config import nodes, parse_experiment, renamed, setting_names
from eaft_prune.config.defaults import MISSING
from eaft_prune.config.renamed import RENAMED
from eaft_prune.core.types import UserError

CONF = REPOSITORY / "conf"
OVERLAYS = "experiment"  # what was published is pinned there, whatever the defaults become


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        yield prefix + name, value
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{name}.")


def given(file: Path) -> dict[str, Any]:
    """Dotted name -> value of all that a file of conf/ sets."""
    values = yaml.safe_load(file.read_text())
    values.pop("defaults", None)
    if file.parent != CONF and "@package _global_" not in file.read_text():
        values = {file.parent.name: values}
    return dict(leaves({name: value for name, value in values.items() if name != "hydra"}))


def own_defaults() -> dict[str, Any]:
    found = {name: value for _, node in nodes() for name, value in leaves(node)}
    return {name: value for name, value in found.items() if value != MISSING}


FILES = sorted(file for file in CONF.rglob("*.yaml") if file.parent.name != OVERLAYS)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(CONF)))
def test_no_file_says_again_what_a_setting_s_default_is(file: Path) -> None:
    known = own_defaults()
    assert [name for name, value in given(file).items() if known.get(name, MISSING) == value] == []


@pytest.mark.parametrize("file", [CONF / "config.yaml", *sorted(CONF.glob("task/*.yaml"))])
def test_what_every_run_or_task_has_is_no_second_default(file: Path) -> None:
    """These files are no choice of the user's values: whatever they gave would be the default."""
    known = own_defaults()
    assert [n for n, v in given(file).items() if n in known and not isinstance(v, Mapping)] == []


def test_what_no_option_says_is_the_default() -> None:
    (experiment,) = check(["task=search"]).experiments
    composed = dict(leaves(experiment.model_dump(mode="json")))
    chosen = "model/demo packs/demo pruning/eaft_reap gate/near_lossless_v1 eval/demo task/search"
    options = {name for option in chosen.split() for name in given(CONF / f"{option}.yaml")}
    both = {n for v in "12" for n in given(CONF / f"gate/near_lossless_v{v}.yaml")}
    options |= {name.replace("gate", "beside", 1) for name in both}
    own = {n: v for n, v in own_defaults().items() if n in composed and n not in options}
    assert len(own) > 100
    assert {n: composed[n] for n, v in own.items() if not isinstance(v, dict)} == {
        n: v for n, v in own.items() if not isinstance(v, dict)
    }


OLD = {  # as the last version wrote them -> what they are
    "eval": [({"stop": None}, {"early_stop": False}), ({"stop": "decided"}, {"early_stop": True})],
    "profile": [
        (
            {"stop": "converged", "stop_first_blocks": 4, "stop_jaccard": 0.9},
            {
                "early_stop": True,
                "early_stop_first_blocks": 4,
                "early_stop_agreement": 0.9,
            },
        ),
        ({"stop": "never"}, {"early_stop": False}),
    ],
    "marginal": [({"stop_confidence": None}, {"early_stop": False})],
    "search": [
        ({"stop_confidence": None}, {"early_stop": False}),
        ({"stop_confidence": 0.9}, {"early_stop": True, "early_stop_confidence": 0.9}),
    ],
}


@pytest.mark.parametrize(
    ("section", "old", "today"),
    [(section, *pair) for section, pairs in OLD.items() for pair in pairs],
)
def test_a_file_with_old_names_gives_the_same_experiment(
    section: str, old: dict[str, Any], today: dict[str, Any]
) -> None:
    (experiment,) = check(["task=search" if section == "search" else "task=noop"]).experiments
    values = experiment.model_dump(mode="json")
    before = {k: v for k, v in values[section].items() if not k.startswith("early_stop")}
    written = {**values, section: {**before, **old}}
    assert renamed(values) == values
    assert parse_experiment(renamed(written)) == parse_experiment(
        {**values, section: {**values[section], **today}}
    )
    with pytest.raises(UserError, match="unknown setting"):
        parse_experiment(written)


def test_an_old_name_is_refused_with_the_new_one() -> None:
    names = setting_names()
    for old in RENAMED:
        assert old not in names
        with pytest.raises(UserError) as refused:
            check([f"{old}=1"])
        before, _, after = str(refused.value).partition(f"unknown setting {old}: ")
        assert before == ""
        if after.startswith("nothing needs it now"):
            continue
        told = after.removeprefix("it is ").removesuffix(" now").split(" and ")
        assert set(told) <= set(names)
