"""A checkpoint that brings code of its own: nothing of it runs, whatever stdin says."""

from __future__ import annotations

import ast
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import tiny
from support.engines import options
from support.runs import REPOSITORY, World

from eaft_prune.checkpoints.families import family_of
from eaft_prune.checkpoints.read import open_model
from eaft_prune.checks.verify import smoke_load
from eaft_prune.core.types import UserError
from eaft_prune.engines.loading import load_files
from eaft_prune.packs.tokenizer import load_tokenizer

pytest_plugins = ("support.worlds",)

CODE = """
from transformers import GptOssConfig, GptOssForCausalLM, PreTrainedTokenizerFast

open({marker!r}, "w").close()


class Config(GptOssConfig):
    pass


class Model(GptOssForCausalLM):
    pass


class EvilTokenizer(PreTrainedTokenizerFast):
    pass
"""
MAP = {
    name: f"evil.{kind}"
    for kind, names in {
        "Config": ("AutoConfig",),
        "Model": ("AutoModel", "AutoModelForCausalLM"),
        "Generation": ("AutoGenerationConfig",),
    }.items()
    for name in names
}


def add(path: Path, **values: Any) -> None:
    held = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**held, **values}))


def with_code(model: Path, marker: Path) -> None:
    """Let every file that may name code name the same module, which leaves `marker`."""
    (model / "evil.py").write_text(CODE.format(marker=str(marker)))
    add(model / "config.json", auto_map=MAP)
    add(model / "generation_config.json", auto_map=MAP, custom_generate="evil")
    add(model / "processor_config.json", auto_map={"AutoProcessor": "evil.EvilTokenizer"})
    add(
        model / "tokenizer_config.json",
        tokenizer_class="EvilTokenizer",
        auto_map={"AutoTokenizer": [None, "evil.EvilTokenizer"]},
    )


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What foreign code would leave; stdin says yes to everything."""
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 100))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    return tmp_path / "ran"


def dense(path: Path) -> None:
    load_files(open_model(path), options())


def packed(path: Path) -> None:
    load_files(open_model(path), options("packed"))


def tokenizer(path: Path) -> None:
    load_tokenizer(path)


def smoke(path: Path) -> None:
    for finding in smoke_load(family_of(open_model(path).config), path):
        raise UserError(finding.what)


@pytest.mark.parametrize(
    ("loaded", "refuses"), [(dense, False), (packed, False), (tokenizer, True), (smoke, True)]
)
def test_no_loading_call_runs_the_code(
    loaded: Callable[[Path], None], refuses: bool, tmp_path: Path, marker: Path
) -> None:
    path = tiny.write_checkpoint(tmp_path / "model")
    with_code(path, marker)
    if refuses:
        with pytest.raises(UserError, match="custom code") as caught:
            loaded(path)
        assert "\n" not in str(caught.value)
    else:
        loaded(path)  # a family of ours is loaded by transformers' own class
    assert not marker.exists()


def test_a_run_ends_with_one_line(world: World, tmp_path: Path, marker: Path) -> None:
    place = world.copied(tmp_path)
    with_code(place.model, marker)
    error = place.run().failed()
    assert "custom code" in error
    assert "\n" not in error
    assert not marker.exists()


def test_every_loading_call_says_no() -> None:
    """transformers asks where it is not told: no call may leave it out."""
    calls = [
        (path.name, node)
        for folder in ("src", "benchmarks", "tools")
        for path in (REPOSITORY / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in ("from_pretrained", "from_config")
    ]
    assert len(calls) >= 6
    for name, call in calls:
        said = {word.arg: word.value for word in call.keywords}.get("trust_remote_code")
        assert isinstance(said, ast.Constant), (name, call.lineno)
        assert said.value is False, (name, call.lineno)
