"""Reading checkpoints: what is whole is read as safetensors reads it, what is not is one error."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from support import tiny

from eaft_prune.checkpoints.families import family_of
from eaft_prune.checkpoints.read import (
    INDEX,
    file_hashes,
    model_digest,
    open_model,
    read_header,
    tensor_bytes,
)
from eaft_prune.checkpoints.slice import Slice, write_sliced
from eaft_prune.core.types import UserError

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def nothing(done: int) -> None:
    pass


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    """A private copy of the tiny checkpoint, to damage."""
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


def opened(path: Path) -> None:
    """All that is checked of a checkpoint before it is used."""
    model = open_model(path)
    family_of(model.config).table(model)
    file_hashes(model, nothing)


def refused(path: Path, *named: str) -> None:
    """Opening raises one UserError that names the offender in one line."""
    with pytest.raises(UserError) as caught:
        opened(path)
    assert "\n" not in str(caught.value)
    for name in named:
        assert name in str(caught.value)


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write(path: Path, header: dict[str, Any], body: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def edit_index(path: Path, edit: Callable[[dict[str, str]], Any]) -> None:
    index = json.loads((path / INDEX).read_text())
    edit(index["weight_map"])
    (path / INDEX).write_text(json.dumps(index))


def shard_of(path: Path, name: str) -> str:
    return next(shard for shard in SHARDS if name in header_of(path / shard)[0])


def other_shard(path: Path, name: str) -> str:
    return next(shard for shard in SHARDS if name not in header_of(path / shard)[0])


def rewrite(path: Path, edit: Callable[[dict[str, np.ndarray[Any, Any]]], Any], **how: Any) -> None:
    """Write the checkpoint's weights again after `edit` changed the tensors."""
    weights = tiny.tensors(json.loads((path / "config.json").read_text()), 0)
    edit(weights)
    tiny.write_weights(path, weights, 2, **how)


def test_a_whole_checkpoint_is_accepted(checkpoint: Path) -> None:
    opened(checkpoint)


def test_entries_are_what_safetensors_reads(checkpoint: Path) -> None:
    model = open_model(checkpoint)
    seen = set()
    for shard in model.shards:
        with safe_open(checkpoint / shard, "numpy") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                array, entry = file.get_tensor(name), model.tensors[name]
                seen.add(name)
                assert (entry.file, entry.shape) == (shard, array.shape)
                assert b"".join(tensor_bytes(model, name)) == array.tobytes()
                assert b"".join(tensor_bytes(model, name, 1)) == array[1].tobytes()
    assert seen == set(model.tensors)
    assert model.weight_bytes == sum(entry.nbytes for entry in model.tensors.values())


def test_a_single_file_without_index_is_a_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    single = tmp_path / "single"
    single.mkdir()
    shutil.copy(checkpoint / "config.json", single)
    tiny.write_weights(single, tiny.tensors(tiny.config(), 0), 1)
    (single / "model-00001-of-00001.safetensors").rename(single / "model.safetensors")
    (single / INDEX).unlink()
    opened(single)
    assert set(open_model(single).tensors) == set(open_model(checkpoint).tensors)


def test_companions_are_the_small_files_and_no_weights(copy: Path) -> None:
    before = model_digest(file_hashes(open_model(copy), nothing))
    for name in ("pytorch_model.bin", ".hidden", "old.gguf", "manifest.json", "README.md"):
        (copy / name).write_text("x")
    for folder in ("original", "metal", "onnx", ".cache", "empty", "checkpoint-500"):
        (copy / folder).mkdir()
        if folder != "empty":
            (copy / folder / "config.json").write_text("{}")
    (copy / "onnx" / "model.bin").write_text("x")
    (copy / "checkpoint-500" / "model.safetensors").write_text("x")
    assert model_digest(file_hashes(open_model(copy), nothing)) == before
    (copy / "chat_template.jinja").write_text("x")
    (copy / "additional_chat_templates").mkdir()
    (copy / "additional_chat_templates" / "rag.jinja").write_text("x")
    (copy / "additional_chat_templates" / "README.md").write_text("x")
    assert open_model(copy).companions == (
        "additional_chat_templates/README.md",
        "additional_chat_templates/rag.jinja",
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
    )
    changed = model_digest(file_hashes(open_model(copy), nothing))
    (copy / "additional_chat_templates" / "rag.jinja").write_text("y")
    assert len({before, changed, model_digest(file_hashes(open_model(copy), nothing))}) == 3


POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 27868174\n"


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "t/a.jinja", INDEX, *SHARDS])
def test_a_pointer_of_git_lfs_is_called_one(copy: Path, name: str) -> None:
    (copy / "t").mkdir()
    (copy / name).write_text(POINTER)
    refused(copy, str(copy / name), "Git LFS pointer", "git lfs pull")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", INDEX])
def test_json_that_was_cut_is_named(copy: Path, name: str) -> None:
    (copy / name).write_text((copy / name).read_text()[:-2])
    refused(copy, str(copy / name), "not JSON")


@pytest.mark.parametrize("metadata", [None, "x", []])
def test_an_index_without_metadata_is_refused_as_transformers_does(
    copy: Path, metadata: Any
) -> None:
    index = json.loads((copy / INDEX).read_text())
    (copy / INDEX).write_text(json.dumps({**index, "metadata": metadata}))
    with pytest.raises(TypeError):
        tiny.eager_model(copy)
    del index["metadata"]
    (copy / INDEX).write_text(json.dumps(index))
    with pytest.raises(KeyError):
        tiny.eager_model(copy)
    total = sum(entry.stat().st_size for entry in copy.glob("*.safetensors"))
    with pytest.raises(UserError, match=r'"metadata": \{"total_size": (\d+)\}') as caught:
        opened(copy)
    size = int(str(caught.value).split('"total_size": ')[1].rstrip("}"))
    assert size == total - sum(
        8 + struct.unpack("<Q", (copy / s).read_bytes()[:8])[0] for s in SHARDS
    )
    (copy / INDEX).write_text(json.dumps({**index, "metadata": {"total_size": size}}))
    opened(copy)
    tiny.eager_model(copy)


def test_what_loaders_make_themselves_may_be_stored(
    copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = {**tiny.config(), "tie_word_embeddings": True}
    (copy / "config.json").write_text(json.dumps(config))
    frequencies = [f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(2)]

    def tie(weights: dict[str, np.ndarray[Any, Any]]) -> None:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].copy()
        weights |= {name: np.ones(8, np.float32) for name in frequencies}

    rewrite(copy, tie)
    with caplog.at_level("INFO"):
        opened(copy)
    (said,) = caplog.messages
    assert all(name in said for name in ("lm_head.weight", *frequencies))
    tiny.eager_model(copy)  # transformers takes it too

    def untie(weights: dict[str, np.ndarray[Any, Any]]) -> None:
        tie(weights)
        weights["lm_head.weight"][-1, -1] += 1

    rewrite(copy, untie)
    refused(copy, "lm_head.weight", "tie_word_embeddings")


def test_tied_embeddings_need_no_output_tensor(copy: Path) -> None:
    (copy / "config.json").write_text(json.dumps({**tiny.config(), "tie_word_embeddings": True}))
    rewrite(copy, lambda weights: weights.pop("lm_head.weight"))
    opened(copy)
    (copy / "config.json").write_text(json.dumps(tiny.config()))
    refused(copy, "lm_head.weight")


def test_plain_weights_under_a_leftover_quantization_config_are_called_so(tmp_path: Path) -> None:
    path = tiny.write_checkpoint(tmp_path / "plain", dtype="BF16", quantization_config=None)
    opened(path)
    (path / "config.json").write_text(json.dumps(tiny.config()))
    refused(path, "config.json", "quantization_config", "mxfp4", "plain floats")


@pytest.mark.parametrize("name", ["hidden_size", "intermediate_size"])
def test_sizes_that_mxfp4_cannot_hold_are_named(tmp_path: Path, name: str) -> None:
    refused(tiny.write_checkpoint(tmp_path / "odd", **{name: 48}), name, "48", "32")
    opened(tiny.write_checkpoint(tmp_path / "plain", quantization_config=None, **{name: 48}))


def test_hashes_are_the_files_sha256(checkpoint: Path) -> None:
    done: list[int] = []
    hashes = file_hashes(open_model(checkpoint), done.append)
    expected = {
        item.name: hashlib.sha256(item.read_bytes()).hexdigest() for item in checkpoint.iterdir()
    }
    assert hashes == expected
    assert sum(done) >= sum((checkpoint / shard).stat().st_size for shard in SHARDS)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", INDEX, *SHARDS])
def test_the_digest_changes_with_every_file(copy: Path, name: str) -> None:
    before = model_digest(file_hashes(open_model(copy), nothing))
    if name in SHARDS:
        header, body = header_of(copy / name)
        write(copy / name, header, bytes([body[0] ^ 1]) + body[1:])
    else:
        (copy / name).write_text((copy / name).read_text() + "\n")
    assert model_digest(file_hashes(open_model(copy), nothing)) != before


def test_missing_parts_are_named(copy: Path, tmp_path: Path) -> None:
    refused(tmp_path / "absent", "absent")
    (copy / SHARDS[1]).unlink()
    refused(copy, SHARDS[1])
    (copy / INDEX).unlink()
    refused(copy, INDEX)
    (copy / "config.json").unlink()
    refused(copy, "config.json")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\x00"])
@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_json_that_is_none_is_named(copy: Path, name: str, text: str) -> None:
    (copy / name).write_text(text)
    refused(copy, name)


@pytest.mark.parametrize("weight_map", [None, {}, [], {"a": 1}, {"a": None}, {"a": ["b"]}])
def test_an_index_without_a_usable_map_is_named(copy: Path, weight_map: Any) -> None:
    (copy / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    refused(copy, INDEX)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1, -4096])
def test_a_truncated_shard_is_named(copy: Path, keep: int) -> None:
    data = (copy / SHARDS[0]).read_bytes()
    (copy / SHARDS[0]).write_bytes(data[:keep])
    refused(copy, SHARDS[0])


def test_bytes_after_the_last_tensor_are_damage(copy: Path) -> None:
    with (copy / SHARDS[0]).open("ab") as file:
        file.write(b"\0")
    refused(copy, SHARDS[0])


def test_an_index_that_names_an_absent_tensor_is_named(copy: Path) -> None:
    edit_index(copy, lambda names: names.update({"model.ghost.weight": SHARDS[0]}))
    refused(copy, "model.ghost.weight")


def test_an_index_that_names_the_wrong_shard_is_named(copy: Path) -> None:
    other = other_shard(copy, "model.norm.weight")
    edit_index(copy, lambda names: names.update({"model.norm.weight": other}))
    refused(copy, "model.norm.weight", other)


def test_a_tensor_the_index_does_not_name_is_named(copy: Path) -> None:
    edit_index(copy, lambda names: names.pop("lm_head.weight"))
    refused(copy, "lm_head.weight")


@pytest.mark.parametrize("home", SHARDS)
def test_a_tensor_in_two_shards_is_named(copy: Path, home: str) -> None:
    """Whichever of the two the index means, and however equal their bytes."""
    header, body = header_of(copy / home)
    name, info = next((n, i) for n, i in header.items() if n.endswith("router.weight"))
    first, end = info["data_offsets"]
    other = other_shard(copy, name)
    theirs, more = header_of(copy / other)
    theirs[name] = {**info, "data_offsets": [len(more), len(more) + end - first]}
    write(copy / other, theirs, more + body[first:end])
    refused(copy, name)


def test_an_unknown_tensor_in_an_moe_layer_is_named(copy: Path) -> None:
    extra = "model.layers.1.mlp.shared_expert.weight"
    rewrite(copy, lambda weights: weights.update({extra: np.zeros((8, 4), np.float32)}))
    refused(copy, extra)


def test_a_missing_tensor_is_named(copy: Path) -> None:
    gone = "model.layers.1.mlp.experts.down_proj_scales"
    rewrite(copy, lambda weights: weights.pop(gone))
    refused(copy, gone)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp.experts.gate_up_proj_blocks",
        "model.layers.0.mlp.experts.down_proj_bias",
        "model.layers.1.mlp.router.weight",
        "model.layers.1.mlp.router.bias",
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.sinks",
    ],
)
def test_a_wrong_leading_dimension_is_named(copy: Path, name: str) -> None:
    rewrite(copy, lambda weights: weights.update({name: weights[name][:-1]}))
    refused(copy, name)


def test_experts_of_another_dtype_are_named(copy: Path) -> None:
    name = "model.layers.0.mlp.experts.down_proj_blocks"
    rewrite(copy, lambda weights: weights.update({name: weights[name].astype(np.float32)}))
    refused(copy, name)


def test_an_integer_where_a_float_belongs_is_named(copy: Path) -> None:
    name = "model.layers.0.mlp.router.weight"
    rewrite(copy, lambda weights: weights.update({name: weights[name].astype(np.int32)}))
    refused(copy, name)


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("position", [0, -1])
def test_a_nan_weight_is_named(copy: Path, dtype: str, position: int) -> None:
    name = "model.layers.1.self_attn.o_proj.weight"

    def edit(weights: dict[str, np.ndarray[Any, Any]]) -> None:
        weights[name].reshape(-1)[position] = np.nan

    rewrite(copy, edit, dtype=dtype)
    refused(copy, name)


@pytest.mark.parametrize("pattern", [0x7F81, 0x7FC0, 0x7FFF, 0xFF81, 0xFFFF])
def test_every_bfloat16_nan_pattern_is_refused(copy: Path, pattern: int) -> None:
    rewrite(copy, lambda weights: None, dtype="BF16")
    name = "model.layers.0.input_layernorm.weight"
    _poke(copy, name, struct.pack("<H", pattern))
    refused(copy, name)


@pytest.mark.parametrize("pattern", [0x7F80, 0xFF80, 0x0000, 0x8000, 0x7F7F, 0x0001, 0x8001])
def test_bfloat16_values_that_are_numbers_are_no_nan(copy: Path, pattern: int) -> None:
    rewrite(copy, lambda weights: None, dtype="BF16")
    _poke(copy, "model.layers.0.input_layernorm.weight", struct.pack("<H", pattern))
    opened(copy)


def test_a_nan_scale_is_named(copy: Path) -> None:
    name = "model.layers.1.mlp.experts.gate_up_proj_scales"

    def edit(weights: dict[str, np.ndarray[Any, Any]]) -> None:
        weights[name].reshape(-1)[77] = 255  # e8m0 has one NaN

    rewrite(copy, edit)
    refused(copy, name)


def test_blocks_may_hold_any_byte(copy: Path) -> None:
    name = "model.layers.1.mlp.experts.gate_up_proj_blocks"
    rewrite(copy, lambda weights: weights[name].fill(255))
    opened(copy)


def _poke(path: Path, name: str, data: bytes) -> None:
    entry = open_model(path).tensors[name]
    with (path / entry.file).open("r+b") as file:
        file.seek(entry.start + 6)
        file.write(data)


@pytest.mark.parametrize(
    "edit",
    [
        lambda info: info.pop("data_offsets"),
        lambda info: info.pop("shape"),
        lambda info: info.pop("dtype"),
        lambda info: info.update(dtype="F4"),
        lambda info: info.update(data_offsets=[0]),
        lambda info: info.update(data_offsets=None),
        lambda info: info.update(shape=[63]),
        lambda info: info.update(shape=[-64]),
        lambda info: info.update(shape="64"),
        lambda info: info.update(data_offsets=[-256, 0]),
    ],
    ids=[
        "no offsets", "no shape", "no dtype", "unknown dtype", "one offset", "null offsets",
        "short shape", "negative shape", "text shape", "negative offsets",
    ],
)  # fmt: skip
def test_a_header_entry_that_makes_no_sense_names_its_file(
    copy: Path, edit: Callable[[dict[str, Any]], Any]
) -> None:
    shard = shard_of(copy, "model.norm.weight")
    header, body = header_of(copy / shard)
    edit(header["model.norm.weight"])
    write(copy / shard, header, body)
    refused(copy, shard)


def test_tensors_that_overlap_are_refused(copy: Path) -> None:
    shard = shard_of(copy, "model.norm.weight")
    header, body = header_of(copy / shard)
    header["model.norm.weight"]["data_offsets"] = next(
        info["data_offsets"]
        for name, info in header.items()
        if name != "model.norm.weight" and info.get("shape") == [64] and info["dtype"] == "F32"
    )
    write(copy / shard, header, body)
    with pytest.raises(SafetensorError):  # the oracle refuses it too
        safe_open(copy / shard, "numpy").keys()
    refused(copy, shard)


@given(st.data())
def test_damage_to_a_header_is_an_error_wherever_safetensors_sees_one(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Bytes of a header changed: UserError, never another exception, if safetensors refuses."""
    directory = tmp_path_factory.mktemp("header")
    path = directory / "file.safetensors"
    header: dict[str, Any] = {
        "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
        "b": {"dtype": "U8", "shape": [4], "data_offsets": [16, 20]},
    }
    write(path, header, bytes(20))
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 2))):
        raw[data.draw(st.integers(9, len(raw) - 21))] = data.draw(st.sampled_from(
            [0, 1, 32, 34, 44, 45, 48, 49, 57, 58, 91, 93, 97, 123, 125, 255])
        )  # fmt: skip
    path.write_bytes(raw)
    try:
        with safe_open(path, "numpy") as file:
            expected = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, UnicodeDecodeError):
        expected = None
    try:
        ours = {entry.name: list(entry.shape) for entry in read_header(path)}
    except UserError:
        return
    assert expected is not None, f"safetensors refuses what we read as {ours}"
    assert ours == expected


def test_a_slice_rule_is_needed_for_every_tensor(checkpoint: Path, tmp_path: Path) -> None:
    model = open_model(checkpoint)
    rules: dict[str, Slice | None] = dict.fromkeys(model.tensors)
    rules.pop("lm_head.weight")
    with pytest.raises(UserError, match=r"lm_head\.weight"):
        write_sliced(model, rules, tmp_path, 10**9, nothing)
    rules |= {"lm_head.weight": None, "ghost": None}
    with pytest.raises(UserError, match="ghost"):
        write_sliced(model, rules, tmp_path, 10**9, nothing)
    assert list(tmp_path.glob("*.safetensors")) == []


@pytest.mark.parametrize("index", [8, 100, -1])
def test_a_slice_beyond_a_tensor_is_an_error(checkpoint: Path, tmp_path: Path, index: int) -> None:
    """Bytes at such an index belong to another tensor."""
    model = open_model(checkpoint)
    rules: dict[str, Slice | None] = dict.fromkeys(model.tensors)
    name = "model.layers.0.mlp.experts.down_proj_blocks"
    with pytest.raises(UserError, match=name):
        write_sliced(model, {**rules, name: Slice((0, index))}, tmp_path, 10**9, nothing)


def hub_cache(copy: Path) -> Path:
    """The same checkpoint as huggingface_hub lays it out: every file a link to a blob."""
    home = copy.parent / "models--x--y"
    snapshot, blobs = home / "snapshots" / "0123", home / "blobs"
    for folder in (snapshot / "t", blobs):
        folder.mkdir(parents=True)
    (copy / "t").mkdir()
    (copy / "t" / "a.jinja").write_text("a")
    for number, item in enumerate(sorted(copy.rglob("*"))):
        if item.is_file():
            name = item.relative_to(copy)
            shutil.copy(item, blobs / str(number))
            up = "../" * (len(name.parts) + 1)
            (snapshot / name).symlink_to(f"{up}blobs/{number}")
    return snapshot


def test_the_links_of_the_hub_and_those_inside_are_followed(copy: Path) -> None:
    (copy / "chat_template.jinja").symlink_to("tokenizer_config.json")
    (copy.parent / "alias").symlink_to(copy)
    opened(copy.parent / "alias")
    snapshot = hub_cache(copy)
    mine, theirs = (file_hashes(open_model(path), nothing) for path in (copy, snapshot))
    assert mine == theirs
    assert "t/a.jinja" in theirs


@pytest.mark.parametrize("name", ["LICENSE", "t/a.txt", "config.json", INDEX, SHARDS[1]])
@pytest.mark.parametrize("cached", [False, True])
def test_a_link_that_leads_out_is_refused(copy: Path, name: str, cached: bool) -> None:
    root = hub_cache(copy) if cached else copy
    (root / "t").mkdir(exist_ok=True)
    secret = copy.parent / "secret"
    secret.write_text("root:x:0:0")
    (root / name).unlink(missing_ok=True)
    (root / name).symlink_to(secret)
    refused(root, name, str(secret), "outside")


def test_a_blob_is_no_way_out(copy: Path) -> None:
    """Neither a link's blob that is a link, nor `blobs` beside what is no snapshot."""
    snapshot = hub_cache(copy)
    secret = copy.parent / "secret"
    secret.write_text("x")
    (snapshot.parents[1] / "blobs" / "evil").symlink_to(secret)
    (snapshot / "LICENSE").symlink_to("../../blobs/evil")
    refused(snapshot, "LICENSE", str(secret))
    (copy.parent / "blobs").mkdir()
    (copy.parent / "blobs" / "b").write_text("x")
    (copy / "LICENSE").symlink_to("../blobs/b")
    refused(copy, "LICENSE", "outside")


@pytest.mark.parametrize("target", ["..", ".", "/etc", "t"])
def test_a_link_to_a_folder_is_refused(copy: Path, target: str) -> None:
    (copy / "t").mkdir()
    (copy / "folder").symlink_to(target)
    if target == ".":
        opened(copy)  # a folder with weights is passed over
    else:
        refused(copy, "folder", "link")


@pytest.mark.parametrize("shard", ["../x.safetensors", "/x.safetensors", "..", "", ".", "a\0b"])
def test_an_index_names_files_of_its_own_directory(copy: Path, shard: str) -> None:
    for place in (copy.parent, copy / "t"):
        place.mkdir(exist_ok=True)
        shutil.copy(copy / SHARDS[0], place / "x.safetensors")
    edit_index(copy, lambda names: names.update(dict.fromkeys(names, shard)))
    refused(copy)


def fifo(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def directory(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()
    (path / "x.txt").write_text("x")


@pytest.mark.parametrize("name", ["config.json", INDEX, *SHARDS, "tokenizer.json", "NOTICE"])
@pytest.mark.parametrize("what", [fifo, directory])
def test_what_is_no_file_is_named_and_not_opened(
    copy: Path, name: str, what: Callable[[Path], None]
) -> None:
    what(copy / name)
    if what is directory and name in ("tokenizer.json", "NOTICE"):
        opened(copy)  # a folder of companions
    else:
        refused(copy, name, "a pipe" if what is fifo else "a directory")


DEEP = "[" * 100_000 + "]" * 100_000
BOMBS = {
    "deep": DEEP,
    "deeper than is walked": '{"a": ' + "[" * 300 + "]" * 300 + "}",
    "a number of 5000 digits": '{"a": ' + "9" * 5000 + "}",
    "not UTF-8": '{"a": "\udcff"}',
}


@pytest.mark.parametrize("name", ["config.json", INDEX, "tokenizer_config.json"])
@pytest.mark.parametrize("bomb", BOMBS)
def test_json_that_is_a_bomb_is_one_line(copy: Path, name: str, bomb: str) -> None:
    (copy / name).write_bytes(BOMBS[bomb].encode("utf-8", "surrogateescape"))
    refused(copy, name, "is not JSON")


def test_json_of_a_hundred_megabytes_is_not_parsed(copy: Path) -> None:
    with (copy / "config.json").open("ab") as file:
        file.truncate(100_000_001)  # sparse
    refused(copy, "config.json", "100,000,001 bytes")


@pytest.mark.parametrize("length", [10**12, 2**63, 2**64 - 1, 25_000_001])
def test_a_header_that_claims_more_than_is_read(copy: Path, length: int) -> None:
    with (copy / SHARDS[0]).open("r+b") as file:
        file.write(struct.pack("<Q", length))
        file.truncate(26_000_000)
    refused(copy, SHARDS[0], "header")


def test_a_header_of_more_entries_than_a_checkpoint_has(copy: Path) -> None:
    entry = b'"%x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    text = b"{" + b",".join(entry % number for number in range(500_000)) + b"}"
    (copy / SHARDS[0]).write_bytes(struct.pack("<Q", len(text)) + text)
    refused(copy, SHARDS[0], "header of")


@pytest.mark.parametrize(
    "entry",
    [
        '{"dtype": "U8", "shape": [0], "data_offsets": [0, ' + "9" * 5000 + "]}",
        '{"dtype": "U8", "shape": [' + "9" * 4000 + '], "data_offsets": [0, 1]}',
        '{"dtype": "U8", "shape": [' + "2, " * 100_000 + '2], "data_offsets": [0, 1]}',
        '{"dtype": "U8", "shape": [0], "data_offsets": [0, 1e999]}',
        DEEP,
    ],
    ids=["digits", "long shape", "axes", "infinite", "deep"],
)
def test_a_header_entry_that_is_a_bomb(copy: Path, entry: str) -> None:
    text = f'{{"x": {entry}}}'.encode()
    (copy / SHARDS[0]).write_bytes(struct.pack("<Q", len(text)) + text)
    refused(copy, SHARDS[0])


@pytest.mark.parametrize("value", [10**9, 10**4000])
@pytest.mark.parametrize("name", ["num_hidden_layers", "num_local_experts"])
def test_a_config_that_asks_for_a_billion_layers_or_experts(
    copy: Path, name: str, value: int
) -> None:
    changes = {"layer_types": None, name: value}
    (copy / "config.json").write_text(json.dumps({**tiny.config(), **changes}))
    refused(copy, "config.json", str(value)[:8])


def test_folders_in_folders_end(copy: Path) -> None:
    (copy / "/".join("a" * 900)).mkdir(parents=True)
    refused(copy, "too deep")
