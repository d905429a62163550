"""safetensors in, sliced safetensors out; streaming; knows no model code."""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from eaft_prune.fingerprint import digest
from eaft_prune.types import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "I16": 2,
    "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
_CHUNK = 16 << 20
_SYNC = 256 << 20
_THREADS = min(8, os.cpu_count() or 1)
_HEADER_BYTES = 64  # length prefix, __metadata__, padding
_ENTRY_BYTES = 160  # dtype, shape and offsets of one tensor as JSON
MANIFEST = "manifest.json"
MAPPING = "expert_mapping.json"
RECIPE = "reap-recipe.yaml"
SCORES = "reap-scores.yaml"
_RECORDS = ("README.md", MANIFEST, MAPPING, RECIPE, SCORES)  # of one export: not copied, not hashed
_NOT_COPIED = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".msgpack", ".h5", ".lock"}

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
    companions: tuple[str, ...]  # tokenizer, templates ...: copied as they are

    @property
    def weight_bytes(self) -> int:
        return sum(entry.nbytes for entry in self.tensors.values())


@dataclass(frozen=True)
class Written:
    """What an export wrote: sha256 of every file, and the bytes of tensor data."""

    files: Mapping[str, str]  # name -> sha256
    tensor_bytes: int


def open_model(path: Path) -> ModelFiles:
    """Read config and every shard's header; raises UserError on whatever does not fit together."""
    if not path.is_dir():
        raise UserError(f"{path} is not a directory: give a checkpoint directory as model.path")
    config = read_json(path / "config.json")
    index_path = path / INDEX
    if index_path.exists():
        weight_map = read_json(index_path).get("weight_map")
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
        for entry in read_header(path / shard):
            if entry.name in tensors:
                raise UserError(f"{path}: tensor {entry.name} is in two shards")
            tensors[entry.name] = entry
    if weight_map is not None:
        _check_index(path, weight_map, tensors)
    companions = sorted(
        item.name
        for item in path.iterdir()
        if item.is_file()
        and item.suffix not in _NOT_COPIED
        and item.name not in ("config.json", INDEX, *_RECORDS)
        and not item.name.startswith(".")
    )
    return ModelFiles(path, config, tensors, shards, tuple(companions))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; raises UserError where there is none."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}, not an object")
    return value


def read_header(path: Path) -> list[TensorEntry]:
    """Entries of one safetensors file in file order; raises UserError if it is cut short."""
    if not path.exists():
        raise UserError(f"{path} is missing: the index names a shard that is not there")
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
        if length < 0 or 8 + length > size:
            raise UserError(f"{path} is truncated: {size} bytes do not hold its header")
        try:
            header = json.loads(file.read(length))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{path} is not a safetensors file: {error}") from None
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
        return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)

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
    """sha256 of config, shards, index and companions; raises UserError on a NaN weight.

    Float tensors are scanned as they are hashed, and e8m0 scales (`*_scales`, where 255 is NaN).
    """
    names = ["config.json", *model.companions, *model.shards]
    if (model.path / INDEX).exists():
        names.append(INDEX)

    def sha256(name: str) -> str:
        sha = hashlib.sha256()
        with (model.path / name).open("rb") as file:
            while chunk := file.read(_CHUNK):
                sha.update(chunk)
                on_bytes(len(chunk))
        return sha.hexdigest()

    with ThreadPoolExecutor(_THREADS) as pool:
        hashes = dict(zip(names, pool.map(sha256, names), strict=True))
    for entry in model.tensors.values():
        has_nan = _nan_test(entry)
        if has_nan is not None:
            with (model.path / entry.file).open("rb") as file:
                if any(has_nan(chunk) for chunk in _read(file, entry.start, entry.nbytes)):
                    raise UserError(f"{model.path / entry.file}: tensor {entry.name} holds NaN")
    return hashes


def model_digest(hashes: Mapping[str, str]) -> str:
    """One digest over all file digests: equal iff every file is equal."""
    return digest(dict(hashes))


Slices = Mapping[str, Sequence[int] | None]  # tensor -> kept indices of axis 0, None = all of it


def write_sliced(
    model: ModelFiles, slices: Slices, out: Path, max_shard_bytes: int, on_bytes: OnBytes
) -> Written:
    """Write every tensor of `slices` into `out`: shards side by side, 16 MiB of each at a time.

    Kept slices are copied byte for byte, in the source's order. Raises UserError for a tensor that
    has no entry in `slices`, or one larger than a shard may be.
    """
    unknown = sorted(set(model.tensors) ^ set(slices))
    if unknown:
        raise UserError(f"no rule says what to do with the tensors {unknown[:5]}")
    for name, kept in slices.items():
        rows = model.tensors[name].shape[:1]
        if kept is not None and not all(0 <= index < rows[0] for index in kept):
            raise UserError(f"tensor {name} has {rows[0]} slices, the plan asks for {list(kept)}")
    files: dict[str, str] = {}
    weight_map: dict[str, str] = {}
    plans = list(_plan_shards(model, slices, max_shard_bytes))
    names = [
        f"model-{number:05d}-of-{len(plans):05d}.safetensors" for number in range(1, len(plans) + 1)
    ]
    with ThreadPoolExecutor(_THREADS) as pool:  # reading, hashing and writing leave Python's lock
        shas = pool.map(
            lambda name, shard: _write_shard(model, shard, slices, out / name, on_bytes),
            names,
            plans,
        )
        files.update(zip(names, shas, strict=True))
    for name, shard in zip(names, plans, strict=True):
        weight_map.update({entry.name: name for entry, _ in shard})
    total = sum(_sliced_bytes(entry, slices[entry.name]) for shard in plans for entry, _ in shard)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    files[INDEX] = write_text(out / INDEX, json.dumps(index, indent=2) + "\n")
    return Written(files, total)


def copy_file(source: Path, target: Path) -> str:
    """Copy bytes (never a link) and return their sha256."""
    sha = hashlib.sha256()
    with source.open("rb") as reader, target.open("xb") as writer:
        while chunk := reader.read(_CHUNK):
            sha.update(chunk)
            writer.write(chunk)
        _sync(writer)
    return sha.hexdigest()


def write_text(path: Path, text: str) -> str:
    """Write a new file to disk and return the sha256 of its bytes."""
    data = text.encode()
    with path.open("xb") as file:
        file.write(data)
        _sync(file)
    return hashlib.sha256(data).hexdigest()


def tensor_bytes(model: ModelFiles, name: str, index: int | None = None) -> Iterator[bytes]:
    """The bytes of a tensor, or of one index of its axis 0, in chunks."""
    entry = model.tensors[name]
    start, length = entry.start, entry.nbytes
    if index is not None:
        length = entry.nbytes // entry.shape[0]
        start += index * length
    with (model.path / entry.file).open("rb") as file:
        yield from _read(file, start, length)


def _check_index(
    path: Path, weight_map: Mapping[str, str], tensors: Mapping[str, TensorEntry]
) -> None:
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name].file != shard:
            raise UserError(f"{path / INDEX} puts tensor {name} in {shard}, which does not hold it")
    extra = sorted(set(tensors) - set(weight_map))
    if extra:
        raise UserError(f"{path / INDEX} does not name {extra[:5]}, which its shards hold")


def _sliced_bytes(entry: TensorEntry, kept: Sequence[int] | None) -> int:
    return entry.nbytes if kept is None else entry.nbytes // entry.shape[0] * len(kept)


def _plan_shards(
    model: ModelFiles, slices: Slices, max_shard_bytes: int
) -> Iterable[list[tuple[TensorEntry, int]]]:
    shard: list[tuple[TensorEntry, int]] = []
    used = _HEADER_BYTES
    for entry in model.tensors.values():
        length = _sliced_bytes(entry, slices[entry.name])
        header = len(json.dumps(entry.name)) + _ENTRY_BYTES
        if _HEADER_BYTES + header + length > max_shard_bytes:
            raise UserError(
                f"tensor {entry.name} needs {length} bytes: raise export.max_shard_bytes = "
                f"{max_shard_bytes}"
            )
        if shard and used + header + length > max_shard_bytes:
            yield shard
            shard, used = [], _HEADER_BYTES
        shard.append((entry, length))
        used += header + length
    if shard:
        yield shard


def _write_shard(
    model: ModelFiles,
    shard: Sequence[tuple[TensorEntry, int]],
    slices: Slices,
    target: Path,
    on_bytes: OnBytes,
) -> str:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry, length in shard:
        kept = slices[entry.name]
        shape = entry.shape if kept is None else (len(kept), *entry.shape[1:])
        header[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(shape),
            "data_offsets": [offset, offset + length],
        }
        offset += length
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensor data starts 8-byte aligned, as the format wants
    sha = hashlib.sha256()
    with target.open("xb") as writer:
        for chunk in (struct.pack("<Q", len(text)), text):
            sha.update(chunk)
            writer.write(chunk)
        writer.flush()
        ranges = [
            (entry.file, chunk)
            for entry, _ in shard
            for start, length in _runs(entry, slices[entry.name])
            for chunk in _chunks(start, length)
        ]
        # one thread copies inside the kernel, one reads and hashes, one waits for the disk
        with (
            _opened(model.path, {file for file, _ in ranges}) as readers,
            ThreadPoolExecutor(2) as pool,
        ):
            hashed = pool.submit(_hash_ranges, sha, readers, ranges)
            flushed, unsynced = pool.submit(lambda: None), 0
            for file, (at, size) in ranges:
                _copy_range(readers[file], writer, at, size)
                on_bytes(size)
                unsynced += size
                if unsynced >= _SYNC and flushed.done():
                    flushed.result()
                    flushed, unsynced = pool.submit(os.fdatasync, writer.fileno()), 0
            flushed.result()
            hashed.result()
        _sync(writer)
    return sha.hexdigest()


@contextmanager
def _opened(folder: Path, names: Iterable[str]) -> Iterator[dict[str, BinaryIO]]:
    with ExitStack() as stack:
        yield {name: stack.enter_context((folder / name).open("rb")) for name in names}


def _hash_ranges(
    sha: Any, readers: Mapping[str, BinaryIO], ranges: Iterable[tuple[str, tuple[int, int]]]
) -> None:
    buffer = memoryview(bytearray(_CHUNK))
    for file, (start, size) in ranges:
        view = buffer[:size]
        while view:
            done = os.preadv(readers[file].fileno(), [view], start)
            if done == 0:
                raise UserError(f"{readers[file].name} ended early: it changed while it was read")
            start, view = start + done, view[done:]
        sha.update(buffer[:size])


def _copy_range(reader: BinaryIO, writer: BinaryIO, start: int, length: int) -> None:
    """Append bytes of one file to another inside the kernel."""
    while length:
        # the source's offset is ours to say, the target's is its own position
        done = os.sendfile(writer.fileno(), reader.fileno(), start, length)
        if done == 0:
            raise UserError(f"{reader.name} ended early: it changed while it was read")
        start, length = start + done, length - done


def _runs(entry: TensorEntry, kept: Sequence[int] | None) -> Iterator[tuple[int, int]]:
    if kept is None:
        yield entry.start, entry.nbytes
        return
    stride = entry.nbytes // entry.shape[0]
    for index in kept:
        yield entry.start + index * stride, stride


def _chunks(start: int, length: int) -> Iterator[tuple[int, int]]:
    for at in range(start, start + length, _CHUNK):
        yield at, min(_CHUNK, start + length - at)


def _read(file: BinaryIO, start: int, length: int) -> Iterator[bytes]:
    file.seek(start)
    while length:
        chunk = file.read(min(length, _CHUNK))
        if not chunk:
            raise UserError(f"{file.name} ended early: it changed while it was read")
        length -= len(chunk)
        yield chunk


def _nan_test(entry: TensorEntry) -> Callable[[bytes], bool] | None:
    """Whether a chunk of this tensor holds NaN; None if its type has none."""
    match entry.dtype:
        case "BF16":
            return lambda chunk: bool(((np.frombuffer(chunk, "<u2") & 0x7FFF) > 0x7F80).any())
        case "F16" | "F32" | "F64":
            kind = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}[entry.dtype]
            return lambda chunk: bool(np.isnan(np.frombuffer(chunk, kind)).any())
        case "U8" if entry.name.endswith("_scales"):
            return lambda chunk: 255 in chunk
    return None


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
