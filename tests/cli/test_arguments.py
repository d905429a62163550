"""What is typed: flags, texts that Hydra's grammar does not take, help."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from support import runs
from support.runs import main

from eaft_prune.cli.grammar import written
from eaft_prune.cli.main import check
from eaft_prune.config import Experiment
from eaft_prune.config.defaults import section_of
from eaft_prune.core.provenance import COMMAND
from eaft_prune.core.types import UserError
from eaft_prune.engines.registry import ENGINES
from eaft_prune.tasks import TASKS

TEXTS = st.text(alphabet="ab \\'\"${}[],:=()~#%?ü/\n", max_size=8)
KEYS = st.text(alphabet="ab_ :,={}[]()\\1.", min_size=1, max_size=6).filter(
    lambda k: k.strip() == k
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=6,
)


def read_back(text: str) -> Any:
    (override,) = OverridesParser.create().parse_overrides([f"key={text}"])
    return OmegaConf.to_container(OmegaConf.create({"key": override.value()}), resolve=True)["key"]


@given(VALUES)
def test_hydra_reads_back_what_is_written(value: Any) -> None:
    assert read_back(written(value)) == value


@pytest.mark.parametrize(
    "path",
    ["~/x", "/a b/c", "/Jürgen/x", "/a(b)", "/a#b", "it's", "a;b", "/x/[1]", "a%20b", "what?"],
)
def test_a_path_needs_no_quotes(path: str) -> None:
    (experiment,) = check(["model=local", f"model.path={path}"]).experiments
    assert experiment.model.path == path


def test_paths_within_mappings_and_lists_need_none_either() -> None:
    arguments = ["packs=local", "packs.files={a: /Jürgen x/a.parquet, b: ~/b.parquet}"]
    (experiment,) = check(arguments).experiments
    assert experiment.packs.files == {"a": "/Jürgen x/a.parquet", "b": "~/b.parquet"}
    with pytest.raises(UserError, match=r"eval\.packs names 'tägliches'"):
        check(["eval.packs=[tägliches, UNION]"])


@pytest.mark.parametrize("more", [[], ["-m", "eval.seed=0"]])
def test_an_interpolation_that_is_typed_is_recorded_as_typed(more: list[str]) -> None:
    text = "model.revision=a${packs.name}"
    invocation = check([text, *more])
    assert invocation.experiments[0].model.revision == "ademo"
    assert text in invocation.typed
    recorded = invocation.composed.hydra.job.env_set.get(COMMAND)
    assert recorded == (None if more else invocation.typed)


@pytest.mark.parametrize("typed", ["=3", "{x}=1", "++", "pruning", "foo bar", "@x=1", "foo(=1"])
def test_what_cannot_be_read_at_all_is_one_line(typed: str, tmp_path: Path) -> None:
    assert f"{typed!r} cannot be read: give section.key=" in main([typed], tmp_path).refused()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--halp"], "--halp: no such flag; did you mean --help?"),
        (["--config-path", "x"], "--config-dir=DIR"),
        (["--config-name=x"], "experiment=NAME"),
        (["--experimental-rerun", "x"], "task=replay"),
        (["--config-dir"], "--config-dir needs a value"),
        (["--config-dir", "/none"], "--config-dir = '/none': no such directory"),
        (["hydra.searchpath=[file:///none]"], "'file:///none': no such directory"),
        (["hydra.searchpath=[pkg://none_such]"], "none_such"),
        (["hydra.searchpath=[/tmp]"], "must begin with file:// or pkg://"),
        (["--cfg", "job", "pruning=nope"], "pruning = 'nope'"),
        (["--help", "prunning"], "did you mean 'pruning'?"),
        (["runtime.device=gpu"], "'gpu': must be auto, cpu, cuda or cuda:N"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_flag_is_one_line_and_code_2(
    arguments: list[str], said: str, tmp_path: Path
) -> None:
    assert said in main(arguments, tmp_path).refused()
    assert list(tmp_path.iterdir()) == []


def test_help_names_every_task_group_and_section(tmp_path: Path) -> None:
    done = main(["--help"], tmp_path)
    assert done.code == 0
    sections = [n for n, f in Experiment.model_fields.items() if section_of(f.annotation)]
    groups = [path.name for path in (runs.REPOSITORY / "conf").iterdir() if path.is_dir()]
    words = set(done.out.replace(",", " ").replace("+", "").split())
    assert words >= {*TASKS, *sections, *groups, "sweeps", "weight_grid", "eaft_reap"}
    assert words.isdisjoint({"_defaults", "null"})


def test_help_of_a_section_explains_every_setting(tmp_path: Path) -> None:
    done = main(["--help", "engine", "gate"], tmp_path)
    assert done.code == 0
    for name in ("engine.name", "engine.experts", "gate.max_js2d", "gate.on_fail"):
        (line,) = [line for line in done.out.splitlines() if line.startswith(f"{name} ")]
        assert len(line.split()) > 3
    assert set(ENGINES) & set(done.out.replace(",", " ").split())


def test_version_is_ours(tmp_path: Path) -> None:
    from importlib.metadata import version

    first, second = main(["--version"], tmp_path).out.splitlines()
    assert first == f"eaft_prune {version('eaft_prune')}"
    assert f"mlflow {version('mlflow')}" in second


@pytest.mark.process
def test_completion_is_registered_for_the_command_that_is_installed(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "eaft_prune", "-sc"]
    script = subprocess.check_output([*command, "install=bash"], cwd=tmp_path, text=True)
    assert script.splitlines()[-1].endswith(" eaft-prune")
    (scripts,) = [
        line for line in (runs.REPOSITORY / "pyproject.toml").read_text().splitlines()
        if line.startswith("eaft-prune = ")
    ]  # fmt: skip
    assert "eaft_prune.__main__:run" in scripts
    asked = {"COMP_LINE": "eaft-prune pruning.keep", "PATH": "/usr/bin:/bin"}
    found = runs.process(["-sc", "query=bash"], tmp_path, **asked).out.split()
    assert "pruning.keep_n=" in found
