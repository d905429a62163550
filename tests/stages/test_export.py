"""Exports: kept bytes are the source's bytes, and a checkpoint is whole or absent."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from support import tiny
from transformers import AutoTokenizer

from eaft_prune.checkpoints.families import family_of
from eaft_prune.checkpoints.read import INDEX, file_hashes, model_digest, open_model
from eaft_prune.core.types import KeepPlan, UserError
from eaft_prune.stages.export import Exported, Target, export, exported_digest, identical_tensors

LAYERS, EXPERTS = 2, 8
KEEP_ALL = KeepPlan((tuple(range(EXPERTS)),) * LAYERS, EXPERTS)
PLAN = KeepPlan(((0, 2, 3, 7), (1, 2, 4, 5)), EXPERTS)
HOW = {"base": {"label": "tiny", "digest": "b" * 64}, "criterion": "test"}


def nothing(done: int) -> None:
    pass


def run(
    source: Path,
    plan: KeepPlan,
    target: Path,
    key: str = "key",
    max_shard_bytes: int = 5_000_000_000,
    on_bytes: Callable[[int], None] = nothing,
) -> Exported:
    files = open_model(source)
    family = family_of(files.config)
    return export(family, files, plan, Target(target, key, max_shard_bytes, HOW), on_bytes)


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor as the safetensors library reads it."""
    read: dict[str, torch.Tensor] = {}
    for shard in sorted(path.glob("*.safetensors")):
        with safe_open(shard, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                assert name not in read
                read[name] = file.get_tensor(name)
    return read


def raw(tensor: torch.Tensor) -> tuple[str, tuple[int, ...], bytes]:
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return (str(tensor.dtype), tuple(tensor.shape), data)


def snapshot(path: Path) -> dict[str, str]:
    return {
        str(item.relative_to(path)): hashlib.sha256(item.read_bytes()).hexdigest()
        for item in path.rglob("*")
        if item.is_file()
    }


def sliced(name: str, tensor: torch.Tensor, plan: KeepPlan) -> torch.Tensor:
    """What the export must hold: experts and router rows picked one by one, the rest as it is."""
    if ".mlp." not in name:
        return tensor
    layer = int(name.split(".")[2])
    return torch.stack([tensor[expert] for expert in plan.kept[layer]])


def leftovers(directory: Path) -> list[str]:
    """What an export left behind beside lock files."""
    return [item.name for item in directory.iterdir() if not item.name.endswith(".lock")]


PLANS = st.integers(1, EXPERTS).flatmap(
    lambda n: st.tuples(
        *[
            st.permutations(range(EXPERTS)).map(lambda ids, n=n: tuple(sorted(ids[:n])))
            for _ in range(LAYERS)
        ]
    ).map(lambda kept: KeepPlan(kept, EXPERTS))
)


@pytest.fixture(scope="module")
def bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As published: floats in bfloat16."""
    return tiny.write_checkpoint(tmp_path_factory.mktemp("bf16") / "base", seed=3, dtype="BF16")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts stored unquantised."""
    path = tmp_path_factory.mktemp("plain") / "base"
    return tiny.write_checkpoint(path, seed=4, quantization_config=None)


@pytest.fixture(scope="module", params=["checkpoint", "bf16", "plain"])
def source(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


def test_keeping_all_is_byte_identical_and_leaves_the_source_alone(
    source: Path, tmp_path: Path
) -> None:
    before = snapshot(source)
    done = run(source, KEEP_ALL, tmp_path / "out")
    assert snapshot(source) == before
    ours, theirs = tensors_of(done.path), tensors_of(source)
    assert {name: raw(t) for name, t in ours.items()} == {n: raw(t) for n, t in theirs.items()}
    assert identical_tensors(open_model(source), open_model(done.path)) == len(theirs)
    assert json.loads((done.path / "config.json").read_text()) == json.loads(
        (source / "config.json").read_text()
    )


@given(plan=PLANS)
@settings(max_examples=8)
def test_kept_experts_are_the_sources_slices(
    source: Path, tmp_path_factory: pytest.TempPathFactory, plan: KeepPlan
) -> None:
    target = tmp_path_factory.mktemp("export") / "out"
    before = snapshot(source)
    run(source, plan, target)
    theirs, ours = tensors_of(source), tensors_of(target)
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert raw(ours[name]) == raw(sliced(name, tensor, plan)), name
    assert snapshot(source) == before


def test_identical_tensors_names_the_one_that_differs(checkpoint: Path, tmp_path: Path) -> None:
    run(checkpoint, KEEP_ALL, tmp_path / "out")
    model = open_model(tmp_path / "out")
    name = "model.layers.1.mlp.experts.down_proj_blocks"
    with (model.path / model.tensors[name].file).open("r+b") as file:
        file.seek(model.tensors[name].start + model.tensors[name].nbytes - 1)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(ValueError, match=name):
        identical_tensors(open_model(checkpoint), model)


# the largest tensor, an embedding, has 76,800 bytes; in the upper range shards hold few tensors
@given(limit=st.one_of(st.integers(1_000, 76_799), st.integers(77_200, 150_000)))
@settings(max_examples=16)
def test_no_shard_is_larger_than_asked(
    checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, limit: int
) -> None:
    target = tmp_path_factory.mktemp("shards") / "out"
    theirs = tensors_of(checkpoint)
    largest = max(sliced(n, t, PLAN).nbytes for n, t in theirs.items())
    if limit < largest:
        with pytest.raises(UserError, match="max_shard_bytes"):
            run(checkpoint, PLAN, target, max_shard_bytes=limit)
        assert leftovers(target.parent) == []
        return
    assert limit >= largest + 400  # a file is larger than its tensors by its header
    run(checkpoint, PLAN, target, max_shard_bytes=limit)
    index = json.loads((target / INDEX).read_text())
    ours: dict[str, torch.Tensor] = {}
    for shard in sorted(set(index["weight_map"].values())):
        assert (target / shard).stat().st_size <= limit
        with safe_open(target / shard, "pt") as file:
            ours |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            assert {n for n, s in index["weight_map"].items() if s == shard} == set(file.keys())
    assert {n: raw(t) for n, t in ours.items()} == {
        n: raw(sliced(n, t, PLAN)) for n, t in theirs.items()
    }
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in ours.values())
    assert {p.name for p in target.glob("*.safetensors")} == set(index["weight_map"].values())


def test_shards_are_numbered_as_loaders_expect(checkpoint: Path, tmp_path: Path) -> None:
    run(checkpoint, PLAN, tmp_path / "out", max_shard_bytes=100_000)
    names = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    count = len(names)
    assert count > 2
    assert names == [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def test_a_tensor_larger_than_a_shard_is_named_and_nothing_is_left(
    checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"embed_tokens|lm_head"):
        run(checkpoint, PLAN, tmp_path / "out", max_shard_bytes=70_000)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("keep", [2, 4])
def test_only_the_expert_count_changes_in_the_config(
    checkpoint: Path, tmp_path: Path, keep: int
) -> None:
    plan = KeepPlan((tuple(range(keep)), tuple(range(8 - keep, 8))), EXPERTS)
    run(checkpoint, plan, tmp_path / "out")
    theirs = json.loads((checkpoint / "config.json").read_text())
    ours = json.loads((tmp_path / "out" / "config.json").read_text())
    assert ours == {**theirs, "num_local_experts": keep}
    assert list(ours) == list(theirs)
    model = open_model(tmp_path / "out")
    family_of(model.config).table(model)


def test_companions_are_copies_not_links(checkpoint: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "snapshots" / "f00", tmp_path / "blobs"
    base = Path(shutil.copytree(checkpoint, snapshot))
    (base / "chat_template.jinja").write_text("{{ messages }}")
    blobs.mkdir()
    (base / "tokenizer.json").rename(blobs / "abc")
    (base / "tokenizer.json").symlink_to(Path("..", "..", "blobs", "abc"))  # as the hub's cache
    run(base, PLAN, tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        ours, theirs = tmp_path / "out" / name, base / name
        assert ours.read_bytes() == theirs.read_bytes()
        assert not ours.is_symlink()
        assert ours.stat().st_ino != theirs.stat().st_ino
        assert ours.stat().st_nlink == 1


def test_folders_go_along_and_named_chat_templates_work(checkpoint: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(checkpoint, tmp_path / "base"))
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "rag.jinja").write_text("rag {{ messages }}")
    (base / "chat_template.jinja").write_text("{{ messages }}")
    done = run(base, PLAN, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(done.path)
    assert tokenizer.chat_template["rag"] == "rag {{ messages }}"
    assert model_digest(file_hashes(open_model(done.path), nothing)) == done.digest
    assert run(base, PLAN, done.path).cached
    (done.path / "additional_chat_templates" / "rag.jinja").unlink()
    with pytest.raises(UserError, match=r"rag\.jinja"):
        run(base, PLAN, done.path)


def test_nothing_is_written_into_the_base(checkpoint: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(checkpoint, tmp_path / "base"))
    before = snapshot(base)
    with pytest.raises(UserError, match="inside the base"):
        run(base, PLAN, base / "exports" / "out")
    assert snapshot(base) == before


def test_what_loaders_make_themselves_is_copied(tmp_path: Path) -> None:
    base = tiny.write_checkpoint(tmp_path / "base", tie_word_embeddings=True)
    weights = tiny.tensors(tiny.config(), 0)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].copy()
    weights["model.rotary_emb.inv_freq"] = np.arange(8, dtype=np.float32)
    tiny.write_weights(base, weights, 2)
    theirs, ours = tensors_of(base), tensors_of(run(base, PLAN, tmp_path / "out").path)
    assert {"lm_head.weight", "model.rotary_emb.inv_freq"} <= set(ours)
    for name, tensor in theirs.items():
        assert raw(ours[name]) == raw(sliced(name, tensor, PLAN)), name
    tiny.eager_model(tmp_path / "out")


def test_mapping_and_manifest_are_true(checkpoint: Path, tmp_path: Path) -> None:
    done = run(checkpoint, PLAN, tmp_path / "out", key="the key")
    mapping = json.loads((done.path / "expert_mapping.json").read_text())["new_to_old"]
    theirs, ours = tensors_of(checkpoint), tensors_of(done.path)
    for layer in range(LAYERS):
        assert len(mapping[str(layer)]) == 4
        name = f"model.layers.{layer}.mlp.experts.gate_up_proj_blocks"
        for new, old in mapping[str(layer)].items():
            assert raw(ours[name][int(new)]) == raw(theirs[name][old])

    manifest = json.loads((done.path / "manifest.json").read_text())
    assert manifest["key"] == "the key"
    assert manifest["base"] == HOW["base"]
    assert manifest["plan"]["kept"] == [list(ids) for ids in PLAN.kept]
    written = {p.name for p in done.path.iterdir()}
    assert set(manifest["files"]) == written - {"manifest.json", "expert_mapping.json", "README.md"}
    for name, facts in manifest["files"].items():
        data = (done.path / name).read_bytes()
        assert facts == {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    assert manifest["digest"] == done.digest
    assert done.bytes_written == sum(t.nbytes for t in ours.values())


def test_the_digest_is_that_of_the_files_on_disk(source: Path, tmp_path: Path) -> None:
    done = run(source, PLAN, tmp_path / "out")
    model = open_model(done.path)
    assert model_digest(file_hashes(model, nothing)) == done.digest
    again = run(source, PLAN, tmp_path / "again", key="other")
    assert again.digest == done.digest


def test_progress_counts_the_tensor_bytes(checkpoint: Path, tmp_path: Path) -> None:
    seen: list[int] = []
    done = run(checkpoint, PLAN, tmp_path / "out", on_bytes=seen.append)
    assert sum(seen) == done.bytes_written


def test_a_rerun_reuses_what_is_there(checkpoint: Path, tmp_path: Path) -> None:
    first = run(checkpoint, PLAN, tmp_path / "out")
    stats = {p.name: p.stat().st_mtime_ns for p in first.path.iterdir()}
    second = run(checkpoint, PLAN, tmp_path / "out")
    assert (first.cached, second.cached) == (False, True)
    assert second.digest == first.digest
    assert {p.name: p.stat().st_mtime_ns for p in first.path.iterdir()} == stats


def test_the_digest_of_a_finished_export_is_known_by_its_key(
    checkpoint: Path, tmp_path: Path
) -> None:
    assert exported_digest(tmp_path / "out", "key") is None
    done = run(checkpoint, PLAN, tmp_path / "out", key="key")
    assert exported_digest(done.path, "key") == done.digest
    assert exported_digest(done.path, "other") is None
    assert exported_digest(checkpoint, "key") is None


def test_other_content_at_the_target_is_an_error_and_stays(
    checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(UserError, match="out"):
        run(checkpoint, PLAN, out)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="out"):
        run(checkpoint, PLAN, out)
    assert snapshot(out).keys() == {"notes.txt"}
    run(checkpoint, PLAN, tmp_path / "two", key="a")
    before = snapshot(tmp_path / "two")
    with pytest.raises(UserError, match="two"):
        run(checkpoint, KEEP_ALL, tmp_path / "two", key="b")
    assert snapshot(tmp_path / "two") == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="file"):
        run(checkpoint, PLAN, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", INDEX])
@pytest.mark.parametrize("damage", ["removed", "shortened"])
def test_a_damaged_export_is_not_reused(
    checkpoint: Path, tmp_path: Path, name: str, damage: str
) -> None:
    path = run(checkpoint, PLAN, tmp_path / "out").path / name
    if damage == "removed":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=name):
        run(checkpoint, PLAN, tmp_path / "out")


def test_the_base_itself_is_no_target(checkpoint: Path, tmp_path: Path) -> None:
    before = snapshot(checkpoint)
    (tmp_path / "link").symlink_to(checkpoint)
    for target in (checkpoint, tmp_path / "link", checkpoint / ".." / checkpoint.name):
        with pytest.raises(UserError, match="base checkpoint"):
            run(checkpoint, PLAN, target)
    assert snapshot(checkpoint) == before


def test_a_ragged_plan_is_an_error(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="layers"):
        run(checkpoint, KeepPlan(((0, 1), (0, 1, 2)), EXPERTS), tmp_path / "out")
    assert leftovers(tmp_path) == []


RAGGED = KeepPlan(((1, 4, 6), (0, 2, 3, 5, 7)), EXPERTS)


def test_a_ragged_plan_is_filled_up_with_experts_nobody_is_routed_to(
    source: Path, tmp_path: Path
) -> None:
    """Every byte is the source's, but for biases of -inf on what the plan drops."""
    before = snapshot(source)
    files = open_model(source)
    family = family_of(files.config)
    done = export(
        family, files, RAGGED, Target(tmp_path / "out", "key", 10**9, HOW, pad_ragged=True), nothing
    )
    layout = KeepPlan(((0, 1, 2, 4, 6), (0, 2, 3, 5, 7)), EXPERTS)
    written, base = tensors_of(done.path), tensors_of(source)
    assert set(written) == set(base)
    for name, tensor in base.items():
        expected = sliced(name, tensor, layout)
        if name == "model.layers.0.mlp.router.bias":
            expected[[0, 2]] = -torch.inf
        assert raw(written[name]) == raw(expected), name
    family.table(open_model(done.path))
    config = json.loads((done.path / "config.json").read_text())
    assert config["num_local_experts"] == 5
    manifest = json.loads((done.path / "manifest.json").read_text())
    assert manifest["plan"]["kept"] == [list(ids) for ids in RAGGED.kept]
    assert manifest["padding"] == [[0, 2], []]
    assert manifest["digest"] == model_digest(file_hashes(open_model(done.path), nothing))
    assert snapshot(source) == before
    assert leftovers(tmp_path) == ["out"]


def test_padding_leaves_a_uniform_plan_as_it_is(checkpoint: Path, tmp_path: Path) -> None:
    files = open_model(checkpoint)
    family = family_of(files.config)
    padded = export(
        family, files, PLAN, Target(tmp_path / "a", "key", 10**9, HOW, pad_ragged=True), nothing
    )
    assert padded.digest == run(checkpoint, PLAN, tmp_path / "b").digest


def test_a_router_without_a_bias_cannot_be_padded(checkpoint: Path, tmp_path: Path) -> None:
    files = open_model(checkpoint)
    table = family_of(files.config).table
    unbiased = {"expert": 0, "axis": None}  # as families whose routers have none
    family = dataclasses.replace(
        family_of(files.config),
        table=lambda model: {
            name: dataclasses.replace(spec, **unbiased) if name.endswith("router.bias") else spec
            for name, spec in table(model).items()
        },
    )
    with pytest.raises(UserError, match=r"pad_ragged.*no bias"):
        export(
            family,
            files,
            RAGGED,
            Target(tmp_path / "out", "k", 10**9, HOW, pad_ragged=True),
            nothing,
        )
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    "plan",
    [
        KeepPlan(((0, 1, 8), (0, 1, 2)), 9),
        KeepPlan(((0, 1), (0, 1)), 4),
        KeepPlan(((0, 1),), EXPERTS),
        KeepPlan(((0, 1),) * 3, EXPERTS),
    ],
    ids=["more experts", "fewer experts", "fewer layers", "more layers"],
)
def test_a_plan_of_another_model_is_an_error(
    checkpoint: Path, tmp_path: Path, plan: KeepPlan
) -> None:
    with pytest.raises(UserError):
        run(checkpoint, plan, tmp_path / "out")
    assert leftovers(tmp_path) == []


def test_an_exception_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    def interrupt(done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(checkpoint, PLAN, tmp_path / "out", on_bytes=interrupt)
    assert leftovers(tmp_path) == []


CHILD = """
    import os, resource, signal, sys
    from pathlib import Path
    from eaft_prune.checkpoints.read import open_model
    from eaft_prune.checkpoints.families import family_of
    from eaft_prune.stages.export import Target, export
    from eaft_prune.core.types import KeepPlan, UserError

    def on_bytes(done):
        {on_bytes}

    files = open_model(Path(sys.argv[1]))
    plan = KeepPlan(((0, 2, 3, 7), (1, 2, 4, 5)), 8)
    how = {{"base": {{"label": "tiny", "digest": "b" * 64}}, "criterion": "test"}}
    try:
        {before}
        target = Target(Path(sys.argv[2]), "key", 10**9, how)
        export(family_of(files.config), files, plan, target, on_bytes)
    except UserError as error:
        print("UserError:", error)
        sys.exit(2)
"""


def child(source: Path, target: Path, **parts: str) -> subprocess.CompletedProcess[str]:
    """An export in a process of its own."""
    code = textwrap.dedent(CHILD).format(**{"on_bytes": "pass", "before": "pass", **parts})
    return subprocess.run(
        [sys.executable, "-c", code, str(source), str(target)], capture_output=True, text=True
    )


@pytest.mark.process
def test_a_write_that_fails_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    """A file size limit stands in for whatever a file system refuses in the middle of a write."""
    before = snapshot(checkpoint)
    limit = (
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))"
    )
    done = child(checkpoint, tmp_path / "out", before=limit)
    assert done.returncode != 0
    assert "File too large" in done.stderr or "full" in done.stdout
    assert leftovers(tmp_path) == []
    assert snapshot(checkpoint) == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A 40 MB file system, where the machine lets us mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.process
def test_a_disk_that_is_too_full_is_one_error_and_leaves_nothing(
    small_disk: Path, tmp_path: Path
) -> None:
    base = tiny.write_checkpoint(tmp_path / "base", vocab_size=60_000)  # 31 MB, most of it kept
    before = snapshot(base)
    (small_disk / "other.bin").write_bytes(bytes(20 << 20))
    written: list[int] = []
    with pytest.raises(UserError, match=r"\d GB free"):
        run(base, PLAN, small_disk / "out", on_bytes=written.append)
    assert written == []  # seen before the first byte
    assert leftovers(small_disk) == ["other.bin"]
    assert snapshot(base) == before


@pytest.mark.process
def test_a_disk_that_fills_up_while_writing_is_one_error_and_leaves_nothing(
    small_disk: Path, tmp_path: Path
) -> None:
    base = tiny.write_checkpoint(tmp_path / "base", vocab_size=30_000)  # 15 MB: it would fit

    def fill(done: int) -> None:  # somebody else writes at the same time
        if not (small_disk / "other.bin").exists():
            (small_disk / "other.bin").write_bytes(bytes(30 << 20))

    with pytest.raises(UserError, match="full"):
        run(base, KeepPlan(((0, 1),) * 2, EXPERTS), small_disk / "out", on_bytes=fill)
    assert leftovers(small_disk) == ["other.bin"]


def test_the_free_space_asked_for_is_enough(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever free space an export accepts holds what it writes."""
    base = tiny.write_checkpoint(tmp_path / "base", vocab_size=60_000)
    plan = KeepPlan(((0, 1),) * 2, EXPERTS)
    done = run(base, plan, tmp_path / "out")
    size = sum(item.stat().st_size for item in done.path.iterdir())
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=size - 1))
    with pytest.raises(UserError, match="free"):
        run(base, plan, tmp_path / "second")


@pytest.mark.process
def test_a_killed_export_leaves_no_checkpoint_and_the_next_one_finishes(
    checkpoint: Path, tmp_path: Path
) -> None:
    killed = child(checkpoint, tmp_path / "out", on_bytes="os.kill(os.getpid(), signal.SIGKILL)")
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert leftovers(tmp_path) == [".out.draft"]
    (tmp_path / ".out.draft" / "junk").write_text("junk")
    done = run(checkpoint, PLAN, tmp_path / "out")
    assert leftovers(tmp_path) == ["out"]
    assert not (done.path / "junk").exists()
    assert done.digest == run(checkpoint, PLAN, tmp_path / "clean").digest


def test_an_export_can_be_pruned_again(checkpoint: Path, tmp_path: Path) -> None:
    """Pruning in two steps is pruning in one."""
    run(checkpoint, PLAN, tmp_path / "half")
    run(tmp_path / "half", KeepPlan(((0, 3), (1, 2)), 4), tmp_path / "quarter")
    direct = run(checkpoint, KeepPlan(((0, 7), (2, 4)), EXPERTS), tmp_path / "direct")
    ours, theirs = tensors_of(tmp_path / "quarter"), tensors_of(direct.path)
    assert {n: raw(t) for n, t in ours.items()} == {n: raw(t) for n, t in theirs.items()}
    manifest = json.loads((tmp_path / "quarter" / "manifest.json").read_text())
    assert manifest["plan"]["n_experts"] == 4


def test_an_export_loads_in_transformers(source: Path, tmp_path: Path) -> None:
    done = run(source, PLAN, tmp_path / "out")
    model = tiny.eager_model(done.path)
    assert model.config.num_local_experts == 4
    with torch.no_grad():
        logits = model(torch.from_numpy(np.arange(20)[None])).logits
    assert torch.isfinite(logits).all()
