"""task=verify: a whole export passes, and every byte that is not as it should be is named."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import tiny
from support.runs import Done, World, edit_shard

from eaft_prune.checkpoints.families import family_of
from eaft_prune.checkpoints.read import file_hashes, model_digest, open_model, tensor_bytes
from eaft_prune.checks.verify import (
    Finding,
    check_base,
    check_files,
    smoke_load,
    work,
)
from eaft_prune.core.types import KeepPlan
from eaft_prune.records.manifest import read_manifest
from eaft_prune.stages.export import Target, export

pytest_plugins = ("support.worlds",)

PLAN = KeepPlan(((0, 2, 3, 7), (1, 2, 4, 5)), 8)


def nothing(done: int) -> None:
    pass


def exported(base: Path, target: Path) -> Path:
    files = open_model(base)
    origin = {"label": "tiny", "digest": model_digest(file_hashes(files, nothing))}
    texts = {"reap-recipe.yaml": "format: 1\n"}
    family = family_of(files.config)
    export(family, files, PLAN, Target(target, "key", 10**9, {"base": origin}, texts), nothing)
    return target


def findings(base: Path, path: Path) -> list[Finding]:
    manifest, files = read_manifest(path), open_model(base)
    family, hashes = family_of(files.config), file_hashes(files, nothing)
    found = check_files(manifest, nothing)
    return [*found, *check_base(family, manifest, files, hashes, nothing)]


def header(shard: Path) -> tuple[int, dict[str, Any]]:
    """Where tensor data begins, and what is where: read by hand."""
    data = shard.read_bytes()
    length = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + length])
    entries.pop("__metadata__", None)
    return 8 + length, entries


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def forge(path: Path) -> None:
    """Make the manifest agree with what lies in the directory."""
    manifest = json.loads((path / "manifest.json").read_text())
    for section in ("files", "records"):
        for name in manifest[section]:
            data = (path / name).read_bytes()
            sha = hashlib.sha256(data).hexdigest()
            manifest[section][name] = {"sha256": sha, "bytes": len(data)}
    hashes = {name: facts["sha256"] for name, facts in manifest["files"].items()}
    manifest["digest"] = model_digest(hashes)
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture(scope="module")
def whole(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export nobody has touched."""
    return exported(checkpoint, tmp_path_factory.mktemp("verify") / "pruned")


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    """An export to be damaged."""
    return shutil.copytree(whole, tmp_path / "pruned")


def test_the_bar_ends_where_the_work_ends(checkpoint: Path, whole: Path) -> None:
    done: list[int] = []
    manifest, base = read_manifest(whole), open_model(checkpoint)
    family, hashes = family_of(base.config), file_hashes(base, nothing)
    check_files(manifest, done.append)
    check_base(family, manifest, base, hashes, done.append)
    headers = sum(header(shard)[0] for shard in whole.glob("*.safetensors"))
    assert work(manifest) - sum(done) == headers  # hashed, but there is nothing to compare


def test_a_whole_export_has_no_findings_and_its_card_may_be_edited(
    checkpoint: Path, copy: Path
) -> None:
    assert findings(checkpoint, copy) == []
    (copy / "README.md").write_text("# mine\n")
    assert findings(checkpoint, copy) == []


def test_files_of_folders_are_checked_too(checkpoint: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(checkpoint, tmp_path / "base"))
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "rag.jinja").write_text("rag")
    path = exported(base, tmp_path / "pruned")
    assert findings(base, path) == []
    (path / "additional_chat_templates" / "rag.jinja").write_text("gar")
    (path / "additional_chat_templates" / "mine.jinja").write_text("mine")
    (path / ".notes").write_text("mine")
    rag, mine = (f"additional_chat_templates/{name}.jinja" for name in ("rag", "mine"))
    assert [(item.file, item.what[:10]) for item in findings(base, path)] == [
        (".notes", "is not in "),
        (mine, "is not in "),
        (rag, "has sha256"),
    ]
    (path / rag).unlink()
    assert Finding(rag, "is missing") in findings(base, path)
    shutil.rmtree(path)
    exported(checkpoint, path)  # as if the folder had been lost, and its base be the other
    assert findings(base, path) == [Finding(rag, "is not the base's")]


@given(position=st.floats(0, 1, exclude_max=True))
@settings(max_examples=12)
def test_any_flipped_weight_byte_is_named_by_file_tensor_and_expert(
    checkpoint: Path, whole: Path, position: float
) -> None:
    (shard,) = whole.glob("*.safetensors")
    begin, entries = header(shard)
    at = int(position * (shard.stat().st_size - begin))
    name, entry = next(
        (n, e) for n, e in entries.items() if e["data_offsets"][0] <= at < e["data_offsets"][1]
    )
    inside = at - entry["data_offsets"][0]
    flip(shard, begin + at)
    try:
        by_file, by_tensor = findings(checkpoint, whole)
    finally:
        flip(shard, begin + at)
    assert (by_file.file, by_file.tensor) == (shard.name, None)
    assert (by_tensor.file, by_tensor.tensor) == (shard.name, name)
    if ".mlp." in name:
        size = (entry["data_offsets"][1] - entry["data_offsets"][0]) // 4
        new, layer = inside // size, int(name.split(".")[2])
        old = PLAN.kept[layer][new]
        assert (by_tensor.expert, by_tensor.base_expert) == (new, old)
        assert by_tensor.what.endswith(f"(the base's {old}) differs from byte {inside % size} on")
    else:
        assert by_tensor.what == f"{name} differs from byte {inside} on"


def test_a_manifest_that_was_forged_with_the_weights_does_not_help(
    checkpoint: Path, copy: Path
) -> None:
    name = "model.layers.1.mlp.router.bias"

    def change(weights: dict[str, np.ndarray[Any, Any]]) -> None:
        weights[name][2] += 1

    shard = edit_shard(copy, name, change).name
    (copy / "tokenizer_config.json").write_text("{}")
    forge(copy)
    found = findings(checkpoint, copy)
    assert found[0] == Finding("tokenizer_config.json", "is not the base's")
    (found_tensor,) = found[1:]
    assert (found_tensor.file, found_tensor.tensor) == (shard, name)
    assert (found_tensor.expert, found_tensor.base_expert) == (2, 4)


def test_a_tensor_that_the_manifest_calls_changed_has_its_bytes(
    checkpoint: Path, copy: Path
) -> None:
    name = "model.layers.0.mlp.experts.down_proj_bias"

    def change(weights: dict[str, np.ndarray[Any, Any]]) -> None:
        weights[name] = weights[name] + 1

    edit_shard(copy, name, change)
    forge(copy)
    assert len(findings(checkpoint, copy)) == 4  # every kept expert
    data = b"".join(tensor_bytes(open_model(copy), name))
    path = copy / "manifest.json"

    def declare(sha: str, level: str = "bias", tensor: str = name) -> None:
        values = {"compensation": {"level": level}, "changed_tensors": {tensor: sha}}
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    declare(hashlib.sha256(data).hexdigest())
    assert findings(checkpoint, copy) == []
    declare("0" * 64)
    (found,) = findings(checkpoint, copy)
    assert found.tensor == name
    assert found.what.endswith("not 000000000000")
    for level, tensor in (("none", name), ("bias", name.replace("_bias", "_blocks"))):
        declare(hashlib.sha256(data).hexdigest(), level, tensor)
        assert any("is not to" in item.what for item in findings(checkpoint, copy))
    declare(hashlib.sha256(data).hexdigest(), "down_proj")

    def shorten(weights: dict[str, np.ndarray[Any, Any]]) -> None:
        weights[name] = weights[name][:3].copy()

    edit_shard(copy, name, shorten)
    forge(copy)
    (found,) = findings(checkpoint, copy)
    assert "is F32 [3, 64], not F32 [4, 64]" in found.what


def test_all_that_is_wrong_is_listed(checkpoint: Path, copy: Path) -> None:
    (copy / "extra.txt").write_text("x")
    (copy / "tokenizer_config.json").unlink()
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "sliding_window": 8}))
    mapping = json.loads((copy / "expert_mapping.json").read_text())
    mapping["new_to_old"]["1"]["0"] = 0
    (copy / "expert_mapping.json").write_text(json.dumps(mapping))
    (copy / "reap-recipe.yaml").write_text("format: 2\n")
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["plan"]["digest"] = "0" * 64
    manifest["digest"] = "1" * 64
    (copy / "manifest.json").write_text(json.dumps(manifest))
    (shard,) = copy.glob("*.safetensors")
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size - 1)
    found = findings(checkpoint, copy)

    def size_of(name: str) -> str:
        return f"has {(copy / name).stat().st_size} bytes,"

    said = {(item.file, " ".join(item.what.split()[:3])) for item in found}
    assert said == {
        ("extra.txt", "is not in"),
        ("tokenizer_config.json", "is missing"),
        ("config.json", size_of("config.json")),
        ("config.json", "sliding_window is 8,"),
        ("expert_mapping.json", size_of("expert_mapping.json")),
        ("expert_mapping.json", "layer 1 is"),
        ("reap-recipe.yaml", "has sha256 " + hashlib.sha256(b"format: 2\n").hexdigest()[:12] + ","),
        (shard.name, size_of(shard.name)),
        ("manifest.json", "its digest is"),
        ("manifest.json", "the plan's digest"),
        ("model.safetensors.index.json", "no tensor can"),
    }


@pytest.fixture(scope="module")
def quick(world: World) -> Done:
    """The quick pipeline in the shared store, and the checkpoint it wrote."""
    done = world.run()
    assert done.code == 0, done.out + done.err
    return done


def test_the_command_line_finds_the_base_and_loads_the_checkpoint(
    world: World, quick: Done
) -> None:
    path = quick.result["checkpoint"]["path"]
    done = world.run("task=verify", f"verify.path={path}")
    assert done.code == 0, done.out + done.err
    assert "VERIFIED" in done.out
    facts = done.result["facts"]
    assert facts["findings"] == []
    assert facts["loaded"]
    assert facts["tensors"] == len(open_model(world.model).tensors)
    assert done.result["stages"] == []
    assert not list(done.cwd.rglob("run.lock.yaml"))


def test_the_command_line_names_a_flipped_byte_with_exit_code_3(
    world: World, quick: Done, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(quick.result["checkpoint"]["path"], tmp_path / "pruned"))
    (shard,) = copy.glob("*.safetensors")
    begin, entries = header(shard)
    name = "model.layers.1.mlp.experts.gate_up_proj_blocks"
    flip(shard, begin + entries[name]["data_offsets"][1] - 1)
    done = world.run("task=verify", f"verify.path={copy}", "verify.load=false")
    assert done.code == 3, done.out + done.err
    assert done.result["status"] == "FINISHED"
    by_file, by_tensor = done.result["facts"]["findings"]
    assert by_file["file"] == by_tensor["file"] == shard.name
    assert by_tensor["tensor"] == name
    assert (by_tensor["expert"], by_tensor["base_expert"]) == (
        3,
        quick.result["plan"]["kept"][1][3],
    )
    assert name in done.out


def test_the_base_must_be_there_and_be_the_one(world: World, copy: Path) -> None:
    def verify(*overrides: str) -> str:
        return world.run("task=verify", f"verify.path={copy}", *overrides).failed()

    assert "give verify.base=DIR" in verify()  # its manifest has no path
    assert "was cut from a checkpoint with" in verify(f"verify.base={world.model}")
    (copy / "manifest.json").unlink()
    assert "manifest.json is missing" in verify()


def test_loading_finds_what_hashes_cannot(tmp_path: Path) -> None:
    good = tiny.write_checkpoint(tmp_path / "good")
    family = family_of(open_model(good).config)
    assert smoke_load(family, good) == []

    def blow_up(weights: dict[str, np.ndarray[Any, Any]]) -> None:
        weights["model.norm.weight"][:] = 3e38

    edit_shard(good, "model.norm.weight", blow_up)
    (found,) = smoke_load(family, good)
    assert "not finite" in found.what
    (good / "tokenizer.json").write_text("{}")
    (found,) = smoke_load(family, good)
    assert found.what.startswith("cannot be loaded")
