"""safetensors in: headers, hashes and bytes of a checkpoint, streaming; knows no model code."""

from __future__ import annotations

import hashlib
import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from eaft_prune.checkpoints.formats import nan_test
from eaft_prune.core.digests import digest
from eaft_prune.core.foreign import check_inside, check_regular, json_in, parsed_json
from eaft_prune.core.types import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
INPUT, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"  # embeddings in every family
_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "I16": 2,
    "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
CHUNK = 16 << 20  # bytes read at a time
THREADS = min(8, os.cpu_count() or 1)
MANIFEST = "manifest.json"
SIGNATURE = "manifest.json.sig"
MAPPING = "expert_mapping.json"
RECIPE = "reap-recipe.yaml"
SCORES = "reap-scores.yaml"
_RECORDS = (
    "README.md",
    MANIFEST,
    SIGNATURE,
    MAPPING,
    RECIPE,
    SCORES,
)  # of one export: not copied, not hashed
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".msgpack", ".h5"}
_OTHER_MODELS = ("original", "metal")  # folders of the same weights for other programs
_DEEPEST = 16  # folders in folders
_MOST_AXES = 16  # of a tensor
_MOST_HEADER = 25_000_000  # bytes; of 150,000 tensors, whose parsing takes seconds
_LFS = b"version https://git-lfs"  # what Git leaves of a large file that was not fetched

OnBytes = Callable[[int], None]


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor's bytes lie: file, absolute offset, length."""

    name: str
    file: str
    dtype: str  # safetensors' name: BF16, U8 ...
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True)
class ModelFiles:
    """A checkpoint directory whose headers have been read and found consistent."""

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorEntry]
    shards: tuple[str, ...]
    companions: tuple[str, ...]  # tokenizer, templates/x ...: relative names, copied as they are
    # what each tensor holds, once a family has checked them: seconds of work for a large model
    table: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)

    @property
    def weight_bytes(self) -> int:
        return sum(entry.nbytes for entry in self.tensors.values())


def open_model(path: Path) -> ModelFiles:
    """Read config and every shard's header; raises UserError on whatever does not fit together.

    Companions are all files, those of folders too, but for weights, hidden files, records of an
    earlier export and folders of other models: `original`, `metal`, any with weights of its own.
    """
    if not path.is_dir():
        raise UserError(f"{path} is not a directory: give a checkpoint directory as model.path")
    check_inside(path, "config.json")
    config = read_json(path / "config.json")
    index_path = path / INDEX
    if index_path.exists():
        check_inside(path, INDEX)
        index = read_json(index_path)
        weight_map = index.get("weight_map")
        if (
            not isinstance(weight_map, dict)
            or not weight_map
            or not all(isinstance(shard, str) for shard in weight_map.values())
        ):
            raise UserError(f"{index_path} has no weight_map")
        shards = tuple(sorted(set(weight_map.values())))
    elif (path / SINGLE).exists():
        weight_map, shards = None, (SINGLE,)
    else:
        raise UserError(f"{path} holds neither {INDEX} nor {SINGLE}: no weights to read")
    tensors: dict[str, TensorEntry] = {}
    for shard in shards:
        check_inside(path, shard)
        for entry in read_header(path / shard):
            if entry.name in tensors:
                raise UserError(f"{path}: tensor {entry.name} is in two shards")
            tensors[entry.name] = entry
    if weight_map is not None:
        _check_index(path, weight_map, tensors)
        _check_metadata(index_path, index, sum(entry.nbytes for entry in tensors.values()))
    own = {"config.json", INDEX, *_RECORDS}
    companions = sorted(name for name in _companions(path) if name not in own)
    for name in companions:
        check_inside(path, name)
        _check_fetched(path / name)
    return ModelFiles(path, config, tensors, shards, tuple(companions))


def _companions(folder: Path, prefix: str = "") -> Iterator[str]:
    for item in folder.iterdir():
        if item.name.startswith("."):
            continue
        if item.is_dir():
            if item.name not in _OTHER_MODELS and not _holds_weights(item):
                if item.is_symlink() or prefix.count("/") == _DEEPEST:
                    raise UserError(f"{item} is a link to a folder, or one too deep: move it away")
                yield from _companions(item, f"{prefix}{item.name}/")
        elif item.suffix not in {*_WEIGHTS, ".lock"}:
            yield prefix + item.name


def _holds_weights(folder: Path) -> bool:
    return any(item.suffix in _WEIGHTS for item in folder.iterdir())


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; raises UserError where there is none."""
    _check_fetched(path)
    value = parsed_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}, not an object")
    return value


def read_header(path: Path) -> list[TensorEntry]:
    """Entries of one safetensors file in file order; raises UserError if it is cut short."""
    size = check_regular(path)
    _check_fetched(path)
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
        if length < 0 or 8 + length > size:
            raise UserError(f"{path} is truncated: {size} bytes do not hold its header")
        if length > _MOST_HEADER:
            raise UserError(f"{path}: a header of {length:,} bytes is not read")
        header = json_in(file.read(length), f"{path} is not a safetensors file")
    if not isinstance(header, dict):
        raise UserError(f"{path} is not a safetensors file: its header is no object")
    header.pop("__metadata__", None)
    entries = [_entry(path, name, info, 8 + length) for name, info in header.items()]
    entries.sort(key=lambda entry: entry.start)
    end = 8 + length
    for entry in entries:
        if entry.start != end:
            raise UserError(f"{path} is damaged: tensor {entry.name} does not follow its neighbour")
        end += entry.nbytes
    if end != size:
        raise UserError(f"{path} is truncated or damaged: {size} bytes, its header says {end}")
    return entries


def _entry(path: Path, name: str, info: Any, origin: int) -> TensorEntry:
    def counts(value: Any) -> bool:
        if not isinstance(value, list) or len(value) > _MOST_AXES:
            return False
        return all(type(n) is int and 0 <= n < 2**63 for n in value)

    match info:
        case {"dtype": str(dtype), "shape": shape, "data_offsets": [start, end]} if counts(
            shape
        ) and counts([start, end]):
            if dtype not in _BYTES:
                raise UserError(f"{path}: tensor {name} has the unknown dtype {dtype}")
            if end - start != math.prod(shape) * _BYTES[dtype]:
                raise UserError(f"{path}: tensor {name} {shape} spans {end - start} bytes")
            return TensorEntry(name, path.name, dtype, tuple(shape), origin + start, end - start)
    raise UserError(f"{path}: the header entry of tensor {name} makes no sense: {info!r:.80}")


def file_hashes(model: ModelFiles, on_bytes: OnBytes) -> dict[str, str]:
    """sha256 of config, shards, index and companions; UserError on what no loader would take.

    That is a NaN weight (float tensors are scanned, and what their format says of others), a stored
    output embedding that is not the input's where config.json ties them, a `.json` that is none.
    """
    for name in model.companions:
        if name.endswith(".json"):
            parsed_json(model.path / name)
    names = ["config.json", *model.companions, *model.shards]
    if (model.path / INDEX).exists():
        names.append(INDEX)

    def sha256(name: str) -> str:
        sha = hashlib.sha256()
        with (model.path / name).open("rb") as file:
            while chunk := file.read(CHUNK):
                sha.update(chunk)
                on_bytes(len(chunk))
        return sha.hexdigest()

    with ThreadPoolExecutor(THREADS) as pool:
        hashes = dict(zip(names, pool.map(sha256, names), strict=True))
    for entry in model.tensors.values():
        has_nan = nan_test(entry.name, entry.dtype)
        if has_nan is not None:
            with (model.path / entry.file).open("rb") as file:
                if any(has_nan(chunk) for chunk in _read(file, entry.start, entry.nbytes)):
                    raise UserError(f"{model.path / entry.file}: tensor {entry.name} holds NaN")
    _check_tied(model)
    return hashes


def model_digest(hashes: Mapping[str, str]) -> str:
    """One digest over all file digests: equal iff every file is equal."""
    return digest(dict(hashes))


def tensor_bytes(
    model: ModelFiles, name: str, index: int | None = None, axis: int = 0
) -> Iterator[bytes]:
    """The bytes of a tensor, or of one index of an axis, in chunks."""
    entry = model.tensors[name]
    outer, length, step = 1, entry.nbytes, 0
    if index is not None:
        outer = math.prod(entry.shape[:axis])
        step = entry.nbytes // outer
        length = step // entry.shape[axis]
    with (model.path / entry.file).open("rb") as file:
        for block in range(outer):
            yield from _read(file, entry.start + block * step + (index or 0) * length, length)


def _check_index(
    path: Path, weight_map: Mapping[str, str], tensors: Mapping[str, TensorEntry]
) -> None:
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name].file != shard:
            raise UserError(f"{path / INDEX} puts tensor {name} in {shard}, which does not hold it")
    extra = sorted(set(tensors) - set(weight_map))
    if extra:
        raise UserError(f"{path / INDEX} does not name {extra[:5]}, which its shards hold")


def _check_tied(model: ModelFiles) -> None:
    """A stored output embedding of tied ones is loaded by some programs and ignored by others."""
    tied = model.config.get("tie_word_embeddings", False)
    if not tied or not {INPUT, OUTPUT} <= model.tensors.keys():
        return
    ours, theirs = model.tensors[OUTPUT], model.tensors[INPUT]
    same = (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
    pairs = zip(tensor_bytes(model, OUTPUT), tensor_bytes(model, INPUT), strict=True)
    if not same or any(a != b for a, b in pairs):
        raise UserError(
            f"{model.path / ours.file}: {OUTPUT} is not {INPUT}, to which config.json ties it "
            "(tie_word_embeddings = true): set that to false, or drop the tensor"
        )


def _check_metadata(path: Path, index: Mapping[str, Any], total_size: int) -> None:
    """transformers takes an index without it for no index at all."""
    if not isinstance(index.get("metadata"), dict):
        raise UserError(
            f"{path} has no metadata, without which transformers does not load it: add "
            f'"metadata": {{"total_size": {total_size}}}'
        )


def _check_fetched(path: Path) -> None:
    """Raise UserError for what Git LFS leaves in place of a file."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        if file.read(len(_LFS)) == _LFS:
            raise UserError(
                f"{path} is a Git LFS pointer, not the file: run `git lfs pull` in its repository"
            )


def _read(file: BinaryIO, start: int, length: int) -> Iterator[bytes]:
    file.seek(start)
    while length:
        chunk = file.read(min(length, CHUNK))
        if not chunk:
            raise UserError(f"{file.name} ended early: it changed while it was read")
        length -= len(chunk)
        yield chunk
