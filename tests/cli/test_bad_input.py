"""What cannot be used: one clear line and code 2, the source untouched, nothing left behind."""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support import runs, tiny
from support.runs import Done, World, edit_shard, untouched, write_pack

pytest_plugins = ("support.worlds",)

INDEX = "model.safetensors.index.json"
Damage = Callable[[Path], list[str]]  # spoils a checkpoint; what the error must name


def refused(place: World, *overrides: str) -> Done:
    """Run; check that it ended with one line and code 2 and left no checkpoint or draft."""
    with untouched(place.model):
        done = place.run(*overrides)
    error = done.failed()
    assert "\n" not in error
    said = done.out + done.err
    assert said.count(f"error: {error}") == 1, said
    assert "Traceback" not in said
    made = [p for p in place.checkpoints.rglob("*") if p.suffix != ".lock"]
    assert made == []
    assert not [p for p in place.home.rglob("*.draft")]
    return done


def shards(model: Path) -> list[Path]:
    return sorted(model.glob("*.safetensors"))


def missing_shard(model: Path) -> list[str]:
    shards(model)[1].unlink()
    return [shards(model)[0].name.replace("00001-of", "00002-of"), "missing"]


def truncated_shard(model: Path) -> list[str]:
    shard = shards(model)[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    return [str(shard), "truncated"]


def truncated_header(model: Path) -> list[str]:
    shard = shards(model)[0]
    shard.write_bytes(shard.read_bytes()[:20])
    return [str(shard), "truncated"]


def empty_shard(model: Path) -> list[str]:
    shards(model)[0].write_bytes(b"")
    return [str(shards(model)[0]), "truncated"]


def not_safetensors(model: Path) -> list[str]:
    shards(model)[0].write_bytes(b"\x08" + b"\0" * 7 + b"not json" + b"\0" * 64)
    return [str(shards(model)[0]), "not a safetensors file"]


def edit_index(model: Path, change: Callable[[dict[str, str]], None]) -> None:
    index = json.loads((model / INDEX).read_text())
    change(index["weight_map"])
    (model / INDEX).write_text(json.dumps(index))


def absent_tensor(model: Path) -> list[str]:
    name = "model.layers.0.mlp.router.scale"
    edit_index(model, lambda weight_map: weight_map.update({name: shards(model)[0].name}))
    return [INDEX, name]


def unlisted_tensor(model: Path) -> list[str]:
    name = "model.layers.1.mlp.router.bias"
    edit_index(model, lambda weight_map: weight_map.pop(name) and None)
    return [INDEX, name]


def index_without_map(model: Path) -> list[str]:
    (model / INDEX).write_text("{}")
    return [INDEX, "weight_map"]


def index_that_is_no_json(model: Path) -> list[str]:
    (model / INDEX).write_text('{"weight_map": {')
    return [INDEX, "JSON"]


def unknown_tensor(model: Path) -> list[str]:
    old, new = "model.layers.1.mlp.router.bias", "model.layers.1.mlp.shared_expert.weight"
    shard = edit_shard(model, old, lambda w: w.update({new: np.zeros((8, 4), np.float32)}))
    edit_index(model, lambda weight_map: weight_map.update({new: shard.name}))
    return [new]


def tensor_gone(model: Path) -> list[str]:
    name = "model.layers.1.mlp.router.bias"
    edit_shard(model, name, lambda weights: weights.pop(name) is None)
    edit_index(model, lambda weight_map: weight_map.pop(name) and None)
    return [name, "missing"]


def wrong_leading_dimension(model: Path) -> list[str]:
    name = "model.layers.0.mlp.experts.down_proj_bias"
    edit_shard(model, name, lambda weights: weights.update({name: weights[name][:7]}))
    return [name, "[7, 64]", "[8, 64]"]


def wrong_dtype(model: Path) -> list[str]:
    name = "model.layers.0.mlp.experts.down_proj_scales"
    changed = {name: np.uint16}
    edit_shard(model, name, lambda w: w.update({n: w[n].astype(t) for n, t in changed.items()}))
    return [name, "U16", "U8"]


def nan_weight(model: Path) -> list[str]:
    name = "model.layers.1.self_attn.q_proj.weight"
    shard = edit_shard(model, name, lambda weights: weights[name].put(7, np.nan))
    return [shard.name, name, "NaN"]


def nan_scale(model: Path) -> list[str]:
    name = "model.layers.1.mlp.experts.gate_up_proj_scales"  # e8m0: 255 is NaN
    shard = edit_shard(model, name, lambda weights: weights[name].put(7, 255))
    return [shard.name, name, "NaN"]


def no_config(model: Path) -> list[str]:
    (model / "config.json").unlink()
    return ["config.json", "missing"]


def edit_config(model: Path, **changes: Any) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **changes}))


def other_family(model: Path) -> list[str]:
    edit_config(model, model_type="llama")
    return ["model_type", "llama", "experts interface"]


def experts_as_text(model: Path) -> list[str]:
    edit_config(model, num_local_experts="eight")
    return ["num_local_experts", "eight"]


def no_weights(model: Path) -> list[str]:
    (model / INDEX).unlink()
    return [str(model), INDEX]


def no_harmony(model: Path) -> list[str]:
    tiny.write_tokenizer(model, [t for t in tiny.SPECIALS if t != "<|channel|>"])
    return [str(model), "<|channel|>", "harmony"]


def no_tokenizer(model: Path) -> list[str]:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    return [str(model), "tokenizer"]


CHECKPOINTS: list[Damage] = [
    missing_shard, truncated_shard, truncated_header, empty_shard, not_safetensors, absent_tensor,
    unlisted_tensor, index_without_map, index_that_is_no_json, unknown_tensor, tensor_gone,
    wrong_leading_dimension, wrong_dtype, nan_weight, nan_scale, no_config, other_family,
    experts_as_text, no_weights, no_harmony, no_tokenizer,
]  # fmt: skip


@pytest.mark.parametrize("damage", CHECKPOINTS, ids=lambda damage: damage.__name__)
def test_checkpoint(world: World, tmp_path: Path, damage: Damage) -> None:
    place = world.copied(tmp_path)
    said = damage(place.model)
    done = refused(place)
    for word in said:
        assert word in done.result["error"], (word, done.result["error"])
    assert not [s for s in done.result["stages"] if s["stage"] == "profile"]


def test_a_model_path_that_is_not_there(world: World, tmp_path: Path) -> None:
    line = world.elsewhere(tmp_path).run(f"model.path={tmp_path / 'nowhere'}").refused()
    assert str(tmp_path / "nowhere") in line
    assert "model.path" in line


Spoil = Callable[[Path], tuple[Path, list[str]]]  # makes a bad pack; what the error must name


def without_text(home: Path) -> tuple[Path, list[str]]:
    path = write_pack(home / "bad.parquet", tiny.rows(40), column="content")
    return path, [str(path), "'text'", "content", "packs.text_column"]


def not_parquet(home: Path) -> tuple[Path, list[str]]:
    path = home / "bad.parquet"
    path.write_text("text\nhello\n" * 100)
    return path, [str(path), "not a parquet file"]


def cut_parquet(home: Path) -> tuple[Path, list[str]]:
    path = write_pack(home / "bad.parquet", tiny.rows(40))
    path.write_bytes(path.read_bytes()[:-100])
    return path, [str(path), "cut short"]


def of_no_format(home: Path) -> tuple[Path, list[str]]:
    path = home / "bad.txt"
    path.write_text("hello")
    return path, [str(path), ".txt", ".parquet, .jsonl"]


def lfs_pointer(home: Path) -> tuple[Path, list[str]]:
    path = home / "bad.parquet"
    path.write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:" + 64 * "a" + "\nsize 123\n"
    )
    return path, [str(path), "Git LFS", "git lfs pull"]


def pipe(home: Path) -> tuple[Path, list[str]]:
    os.mkfifo(home / "bad.parquet")
    return home / "bad.parquet", [str(home / "bad.parquet"), "pipe", "packs.files.beta"]


def a_directory(home: Path) -> tuple[Path, list[str]]:
    (home / "bad.parquet").mkdir()
    return home / "bad.parquet", [str(home / "bad.parquet"), "not a file", "packs.files.beta"]


def absent_file(home: Path) -> tuple[Path, list[str]]:
    return home / "bad.parquet", [str(home / "bad.parquet"), "packs.files.beta"]


def numbers(home: Path) -> tuple[Path, list[str]]:
    path = home / "bad.parquet"
    pq.write_table(pa.table({"text": [1, 2], "words": ["a", "b"]}), path)
    return path, [str(path), "int64", "'text'", "words (text)", "packs.text_column"]


def two_of_one_name(home: Path) -> tuple[Path, list[str]]:
    path = home / "bad.parquet"
    columns = [pa.array(tiny.rows(2)), pa.array(tiny.rows(2, 1))]
    pq.write_table(pa.Table.from_arrays(columns, names=["text", "text"]), path)
    return path, [str(path), "2 columns", "'text'"]


def null_text(home: Path) -> tuple[Path, list[str]]:
    texts = tiny.rows(40)
    path = write_pack(home / "bad.parquet", [*texts[:7], None, *texts[7:]])
    return path, [str(path), "row 7", "null"]


def damaged_page(home: Path) -> tuple[Path, list[str]]:
    """The footer is whole; what it points at is not."""
    path = home / "bad.parquet"
    pq.write_table(pa.table({"text": tiny.rows(400)}), path, compression="zstd")
    data = bytearray(path.read_bytes())
    data[2000:-3000] = np.random.default_rng(0).bytes(len(data) - 5000)
    path.write_bytes(data)
    return path, [str(path), "damaged"]


def not_utf8(home: Path) -> tuple[Path, list[str]]:
    path = home / "bad.parquet"
    texts = [text.encode() for text in tiny.rows(9)]
    texts[3] = b"<|start|>user\xff"
    pq.write_table(pa.table({"text": pa.array(texts, pa.binary()).view(pa.string())}), path)
    return path, [str(path), "row 3", "UTF-8"]


def messages_without_template(home: Path) -> tuple[Path, list[str]]:
    """The world's tokenizer has none."""
    path = home / "bad.parquet"
    pq.write_table(pa.table({"text": [[{"role": "user", "content": "x" * 40_000}]] * 9}), path)
    return path, [str(path), "row 0", "chat template"]


def no_assistant(home: Path) -> tuple[Path, list[str]]:
    rows = ["<|start|>user<|message|>the sum of seven and nine<|end|>"] * 200
    path = write_pack(home / "bad.parquet", rows)
    return path, [str(path), "beta", "assistant"]


def no_rows(home: Path) -> tuple[Path, list[str]]:
    path = write_pack(home / "bad.parquet", [])
    return path, [str(path), "beta"]


AT_ONCE: list[Spoil] = [
    without_text, not_parquet, cut_parquet, of_no_format, lfs_pointer, pipe, a_directory,
    absent_file, numbers, two_of_one_name,
]  # fmt: skip
WHEN_READ: list[Spoil] = [
    null_text, damaged_page, not_utf8, messages_without_template, no_assistant, no_rows,
]  # fmt: skip


@pytest.mark.parametrize("spoil", AT_ONCE, ids=lambda spoil: spoil.__name__)
def test_a_pack_that_is_refused_before_mlflow_starts(
    world: World, tmp_path: Path, spoil: Spoil
) -> None:
    path, said = spoil(tmp_path)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    place = replace(world.elsewhere(tmp_path), packs={**world.packs, "beta": path}, uri=uri)
    line = place.run().refused()
    for word in said:
        assert word in line, (word, line)
    assert len(line) < 400
    assert not (tmp_path / "mlflow.db").exists()


@pytest.mark.parametrize("spoil", WHEN_READ, ids=lambda spoil: spoil.__name__)
def test_a_pack_that_is_refused_when_it_is_read(world: World, tmp_path: Path, spoil: Spoil) -> None:
    path, said = spoil(tmp_path)
    place = replace(world.elsewhere(tmp_path), packs={**world.packs, "beta": path})
    done = refused(place)
    for word in said:
        assert word in done.result["error"], (word, done.result["error"])
    assert len(done.result["error"]) < 600
    assert not [s for s in done.result["stages"] if s["stage"] == "profile"]


def test_a_pack_that_is_not_read_may_be_anywhere(world: World, tmp_path: Path) -> None:
    done = replace(world, packs={"alpha": tmp_path / "nowhere"}).run("task=io_probe")
    assert done.code == 0, done.err


def blocks_there_are(world: World, seq_len: int) -> int:
    """Blocks that all rows of UNION give, counted without the package (split=none)."""
    import pandas as pd
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(world.model)
    texts = [text for path in world.packs.values() for text in pd.read_parquet(path)["text"]]
    return sum(len(tokenizer(text)["input_ids"]) + 1 for text in texts) // seq_len


@pytest.mark.parametrize("part", ["profile", "eval"])
def test_too_few_rows(world: World, tmp_path: Path, part: str) -> None:
    """The error says how many blocks there are; that many work, and one more does not."""
    packs = {
        name: write_pack(tmp_path / f"{name}.parquet", runs.rows(8, seed))
        for seed, name in enumerate(world.packs)
    }
    place = world.elsewhere(tmp_path, packs=packs)
    there = blocks_there_are(place, 64)
    ask = ("packs.split=none", "eval.candidates=[masked]")
    done = refused(place, *ask, f"{part}.num_blocks={there + 1}")
    for word in ("UNION", f"{part}.num_blocks", f"{there + 1} blocks of 64", f"for {there} blocks"):
        assert word in done.result["error"], (word, done.result["error"])
    assert place.run(*ask, "task=profile", f"profile.num_blocks={there}").code == 0


def test_too_few_rows_to_evaluate_are_noticed_before_the_model_runs(
    world: World, tmp_path: Path
) -> None:
    """Fails before the GPU starts."""
    done = refused(world.elsewhere(tmp_path), "eval.num_blocks=100000")
    assert {stage["stage"].split("/")[0] for stage in done.result["stages"]} <= {"inspect", "pack"}


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["pruning.keep_n=1", "pruning.keep_multiple=1", "pruning.core_pos_top_m=0"],
            ["pruning.keep_n = 1", "2 of 8", "2..8"],
        ),
        (["pruning.keep_n=12"], ["pruning.keep_n = 12", "2 of 8", "2..8"]),
        (
            ["pruning.core_pos_top_m=3", "pruning.core_count_top_m=4"],
            ["core", "pruning.keep_n = 4", "pruning.core_pos_top_m"],
        ),
        (["eval.entropy_top_k=301"], ["eval.entropy_top_k = 301", "300"]),
        (["export.max_shard_bytes=100"], ["export.max_shard_bytes", "100"]),
    ],
    ids=["below top_k", "above E", "cores above keep_n", "entropy", "shard"],
)
def test_settings_that_do_not_fit_the_checkpoint(
    world: World, tmp_path: Path, overrides: list[str], said: list[str]
) -> None:
    done = refused(world.elsewhere(tmp_path), *overrides)
    for word in said:
        assert word in done.result["error"], (word, done.result["error"])


def test_keep_n_off_the_multiple_is_refused_without_a_run(world: World) -> None:
    line = world.run("pruning.keep_n=6").refused()
    assert "pruning.keep_n = 6" in line
    assert "pruning.keep_multiple = 4" in line


@pytest.mark.parametrize("name", ["core_pos_top_m", "core_count_top_m", "pack_floor_top_m"])
def test_a_core_above_keep_n_is_refused_without_a_run(world: World, name: str) -> None:
    line = world.run(f"pruning.{name}=5").refused()
    assert f"pruning.{name} = 5" in line
    assert "0..4" in line


@pytest.mark.parametrize("what", ["a directory", "an empty directory", "a file", "the base"])
def test_export_path_that_exists(world: World, tmp_path: Path, what: str) -> None:
    place = world.copied(tmp_path)
    target = tmp_path / "target"
    if what == "a file":
        target.write_text("mine")
    elif what == "the base":
        target = place.model
    else:
        target.mkdir()
        if what == "a directory":
            (target / "mine.txt").write_text("mine")
    done = refused(place, f"export.path={target}")
    assert str(target) in done.result["error"]
    assert "export.path" in done.result["error"]
    if target != place.model:
        assert [p.name for p in tmp_path.glob("target*")] == ["target"]
        assert [p.name for p in tmp_path.glob("target/*")] == ["mine.txt"] * (what == "a directory")
    if what == "a file":
        assert target.read_text() == "mine"


def test_export_path_that_exists_is_noticed_before_the_model_runs(
    world: World, tmp_path: Path
) -> None:
    """Fails before the GPU starts."""
    (tmp_path / "target").mkdir()
    place = world.elsewhere(tmp_path)
    done = refused(place, f"export.path={tmp_path / 'target'}")
    assert {stage["stage"].split("/")[0] for stage in done.result["stages"]} <= {"inspect", "pack"}


def test_two_bases_of_one_name_and_one_plan_are_two_exports(world: World, tmp_path: Path) -> None:
    first = world.elsewhere(tmp_path)
    same_plan = ("pruning=random", "pruning.core_pos_top_m=0", "pruning.seed=5")
    second = first.copied(tmp_path)
    config = json.loads((second.model / "config.json").read_text())
    (second.model / "config.json").write_text(json.dumps({**config, "note": "another"}))
    results = [place.run("task=prune", *same_plan).result for place in (first, second)]
    plans, paths = (
        {str(r[a][b]) for r in results} for a, b in (("plan", "digest"), ("checkpoint", "path"))
    )
    assert len(plans) == 1
    assert len(paths) == 2
    target = tmp_path / "target"
    assert first.run("task=prune", *same_plan, f"export.path={target}").code == 0
    with untouched(target):
        place = second.elsewhere(tmp_path / "fresh")
        done = refused(place, "task=prune", "pruning.keep_n=8", f"export.path={target}")
    assert "another base" in done.result["error"]
    stages = {stage["stage"].split("/")[0] for stage in done.result["stages"]}
    assert stages <= {"inspect", "pack"}  # noticed before the model runs


def test_another_plan_does_not_overwrite_an_export(world: World, tmp_path: Path) -> None:
    place = world.elsewhere(tmp_path)
    to = f"export.path={tmp_path / 'mine'}"
    assert place.run(to).code == 0
    assert place.run(to).code == 0  # the same plan: used again
    with untouched(tmp_path / "mine"):
        done = place.run(to, "pruning=random", "pruning.core_pos_top_m=0", "pruning.seed=5")
    assert str(tmp_path / "mine") in done.failed()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mounts a tmpfs of the given size; skips where that is not allowed."""
    libc = ctypes.CDLL(None, use_errno=True)
    mounted = []

    def mount(size: int) -> Path:
        path = tmp_path / "disk"
        path.mkdir()
        option = f"size={size}".encode()
        if libc.mount(b"tmpfs", str(path).encode(), b"tmpfs", 0, option) != 0:
            pytest.skip(f"a tmpfs cannot be mounted here: {os.strerror(ctypes.get_errno())}")
        mounted.append(path)
        return path

    yield mount
    for path in mounted:
        libc.umount2(str(path).encode(), 2)


def test_a_disk_too_small_for_the_checkpoint(
    world: World, tmp_path: Path, small_disk: Callable[[int], Path]
) -> None:
    disk = small_disk(1 << 20)
    done = refused(world.elsewhere(tmp_path), f"runtime.checkpoint_dir={disk / 'checkpoints'}")
    assert str(disk) in done.result["error"]
    assert "GB free" in done.result["error"]
    assert not [p for p in disk.rglob("*") if p.is_file() and p.suffix != ".lock"]


def test_a_disk_too_small_for_what_lies_beside_the_weights(
    world: World, tmp_path: Path, small_disk: Callable[[int], Path]
) -> None:
    """There was room for the weights, but not for a large file beside them."""
    place = world.copied(tmp_path)
    with (place.model / "large-companion.txt").open("wb") as file:
        file.truncate(24 << 20)  # a hole here, bytes in the copy
    disk = small_disk(18 << 20)
    done = refused(place, f"runtime.checkpoint_dir={disk / 'checkpoints'}")
    assert str(disk) in done.result["error"]
    assert "GB free" in done.result["error"]
    assert not [p for p in disk.rglob("*") if p.is_file() and p.suffix != ".lock"]


def test_a_disk_that_is_full_for_the_store(
    world: World, tmp_path: Path, small_disk: Callable[[int], Path]
) -> None:
    disk = small_disk(64 << 10)
    done = refused(world.elsewhere(tmp_path), f"runtime.store_dir={disk / 'store'}")
    assert str(disk) in done.result["error"]
    assert not [p for p in disk.rglob("*") if ".draft" in p.name]


def test_a_damaged_stage_output_is_made_again(world: World, tmp_path: Path) -> None:
    place = world.elsewhere(tmp_path)
    first = place.run("task=profile").result
    (arrays,) = place.store.glob("profile/*/arrays.safetensors")
    data = bytearray(arrays.read_bytes())
    data[-5] ^= 1
    arrays.write_bytes(data)
    done = place.run("task=profile")
    assert done.code == 0
    assert str(arrays.parent) in done.out + done.err
    again = {stage["stage"]: stage["cached"] for stage in done.result["stages"]}
    assert [stage for stage, hit in again.items() if not hit] == ["profile"]
    assert done.result["digests"] == first["digests"]


def test_a_file_of_the_user_is_never_a_lock(world: World, tmp_path: Path) -> None:
    """Whatever fails, the working directory holds outputs/ and nothing else."""
    done = runs.main([*world.arguments, "pruning.keep_n=12"], tmp_path)
    assert done.code == 2
    assert [p.name for p in tmp_path.iterdir()] == ["outputs"]
