"""The card of an export: what it says is so, what it shows works, and what people wrote stays."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import tiny
from support.forks import fork

from eaft_prune.checkpoints.families import family_of
from eaft_prune.checkpoints.read import open_model
from eaft_prune.core.types import KeepPlan
from eaft_prune.records import card
from eaft_prune.stages.export import Target, export

PLAN = KeepPlan(((0, 2, 3, 7), (1, 2, 4, 5)), 8)
VERDICT = "**PASS** on 7 tokens\n\n| check |\n| :-- |\n| \\1 \\g<0> |"


def exported(source: Path, target: Path, **origin: str) -> str:
    """The card of an export."""
    files = open_model(source)
    how = {"base": {"label": "tiny", "digest": "b" * 64, **origin}, "criterion": "test"}
    place = Target(target, "key", 5_000_000_000, how)
    export(family_of(files.config), files, PLAN, place, lambda done: None)
    return (target / "README.md").read_text()


def header(text: str) -> dict[str, Any]:
    found = re.match(r"---\n(.*?)^---$", text, re.M | re.S)
    assert found
    values = yaml.safe_load(found[1])
    assert isinstance(values, dict)
    return values


@pytest.fixture(scope="module")
def made(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that says nothing of its licence, exported; read-only by agreement."""
    path = tmp_path_factory.mktemp("card") / "out"
    exported(checkpoint, path, hub_id="someone/tiny", revision="main")
    return path


def test_the_snippet_of_the_card_loads_the_checkpoint_and_generates(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (snippet,) = re.findall(
        r"^```python\n(.*?)^```$", (made / "README.md").read_text(), re.M | re.S
    )
    names: dict[str, Any] = {}
    with contextlib.chdir(made):
        exec(snippet, names)
    assert capsys.readouterr().out.startswith("The sum of two and two is")
    experts = names["model"].model.layers[0].mlp.experts
    assert experts.num_experts == 4
    oracle = tiny.eager_model(made).model.layers[0].mlp.experts
    assert (experts.down_proj.float() == oracle.down_proj).all()


def test_sizes_are_those_of_the_loaded_models(checkpoint: Path, made: Path) -> None:
    text = (made / "README.md").read_text()
    rows = dict(re.findall(r"^\| (\w[^|]*) \| (.*) \|$", text, re.M))
    base, ours = (tiny.eager_model(path).num_parameters() for path in (checkpoint, made))
    assert rows["parameters"] == f"{base:,} | {ours:,}"
    assert rows["experts a layer"] == "8 | 4"
    assert rows["experts a token"] == "2 | 2"
    sizes = [sum(p.stat().st_size for p in d.glob("*.safetensors")) for d in (checkpoint, made)]
    shown = [1e9 * float(size) for size in rows["weights, GB"].split(" | ")]
    assert shown == pytest.approx(sizes, rel=0.05)  # files have headers
    assert PLAN.digest in text


def test_the_header_is_what_the_hub_reads(checkpoint: Path, made: Path, tmp_path: Path) -> None:
    values = header((made / "README.md").read_text())
    assert values["base_model"] == "someone/tiny"
    assert values["pipeline_tag"] == "text-generation"
    assert values["library_name"] == "transformers"
    assert "license" not in values
    assert "base_model" not in header(exported(checkpoint, tmp_path / "out", path="/here"))


@pytest.mark.parametrize(
    ("name", "text", "wanted"),
    [
        ("README.md", "---\nlicense: other\nlicense_name: ours\n---\n", ("other", "ours")),
        ("README.md", "---\n- a list\n---\n", (None, None)),
        ("README.md", "---\nlicense: [\n---\n", (None, None)),
        ("README.md", "---\nlicense: [mit]\nlicense_name: {a: b}\n---\n", (None, None)),
        ("README.md", "no header", (None, None)),
        ("LICENSE", "\n   Apache License\n   Version 2.0, January 2004\n", ("apache-2.0", None)),
        ("LICENSE", "MIT License\n\nCopyright", ("mit", None)),
        ("LICENSE", "All rights reserved; not the MIT License", (None, None)),
    ],
)
def test_the_licence_is_the_bases_if_it_says(
    checkpoint: Path, tmp_path: Path, name: str, text: str, wanted: tuple[str | None, str | None]
) -> None:
    base = Path(shutil.copytree(checkpoint, tmp_path / "base"))
    (base / name).write_text(text)
    values = header(exported(base, tmp_path / "out"))
    assert (values.get("license"), values.get("license_name")) == wanted


def test_a_verdict_is_told_once_and_in_its_place_alone(made: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(made, tmp_path / "out"))
    before = (path / "README.md").read_text() + "\nmine\n"
    (path / "README.md").write_text(before)
    card.tell(path, VERDICT)
    told = (path / "README.md").read_text()
    assert told == before.replace("Not evaluated.", VERDICT)
    stat = (path / "README.md").stat()
    card.tell(path, VERDICT)
    assert (path / "README.md").stat() == stat
    card.tell(path, "another")
    assert (path / "README.md").read_text() == before.replace("Not evaluated.", "another")
    assert {p.name for p in path.iterdir()} == {p.name for p in made.iterdir()}


@pytest.mark.parametrize("data", [b"# mine\n", b"\xff<!-- verdict", None])
def test_a_card_of_somebody_elses_is_left_alone(
    made: Path, tmp_path: Path, data: bytes | None
) -> None:
    path = Path(shutil.copytree(made, tmp_path / "out"))
    (path / "README.md").unlink()
    if data is not None:
        (path / "README.md").write_bytes(data)
    card.tell(path, VERDICT)
    assert (path / "README.md").exists() == (data is not None)
    if data is not None:
        assert (path / "README.md").read_bytes() == data


@pytest.mark.process
def test_a_card_that_cannot_be_written_is_said(made: Path) -> None:
    """Root may write everywhere: the process gives that up."""
    with tempfile.TemporaryDirectory() as home:  # pytest's own are root's alone
        os.chmod(home, 0o755)
        path = Path(shutil.copytree(made, Path(home) / "out"))
        path.chmod(0o555)

        def work() -> int:
            logging.basicConfig(force=True)  # pytest keeps what is logged to itself
            if os.geteuid() == 0:
                os.setuid(65534)
            card.tell(path, VERDICT)
            return 0

        process = fork(work, path)
        assert process.wait() == 0, process.text
        path.chmod(0o755)
        assert "does not tell the verdict: Permission denied" in process.text
        assert "Not evaluated." in (path / "README.md").read_text()
