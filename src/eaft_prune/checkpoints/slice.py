"""Sliced safetensors out: bytes of kept experts as they are, streaming; knows no model code."""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from eaft_prune.checkpoints.read import CHUNK, INDEX, THREADS, ModelFiles, OnBytes, TensorEntry
from eaft_prune.core.types import UserError

_SYNC = 256 << 20
_HEADER_BYTES = 64  # length prefix, __metadata__, padding
_ENTRY_BYTES = 160  # dtype, shape and offsets of one tensor as JSON


@dataclass(frozen=True)
class Slice:
    """The indices of one axis of a tensor that are kept."""

    kept: tuple[int, ...]
    axis: int = 0


Slices = Mapping[str, Slice | None]  # of every tensor; None: all of it


@dataclass(frozen=True)
class Written:
    """What an export wrote: sha256 of every file, and the bytes of tensor data."""

    files: Mapping[str, str]  # name -> sha256
    tensor_bytes: int


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
    for name, part in slices.items():
        if part is None:
            continue
        rows = model.tensors[name].shape[part.axis]
        if not all(0 <= index < rows for index in part.kept):
            raise UserError(f"tensor {name} has {rows} slices, the plan asks for {[*part.kept]}")
    files: dict[str, str] = {}
    weight_map: dict[str, str] = {}
    plans = list(_plan_shards(model, slices, max_shard_bytes))
    names = [
        f"model-{number:05d}-of-{len(plans):05d}.safetensors" for number in range(1, len(plans) + 1)
    ]
    with ThreadPoolExecutor(THREADS) as pool:  # reading, hashing and writing leave Python's lock
        shas = pool.map(
            lambda name, shard: _write_shard(model, shard, slices, out / name, on_bytes),
            names,
            plans,
        )
        files.update(zip(names, shas, strict=True))
    for name, shard in zip(names, plans, strict=True):
        weight_map.update({entry.name: name for entry, _ in shard})
    total = sum(sliced_bytes(entry, slices[entry.name]) for shard in plans for entry, _ in shard)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    files[INDEX] = write_text(out / INDEX, json.dumps(index, indent=2) + "\n")
    return Written(files, total)


def copy_file(source: Path, target: Path) -> str:
    """Copy bytes (never a link) and return their sha256."""
    sha = hashlib.sha256()
    with source.open("rb") as reader, target.open("xb") as writer:
        while chunk := reader.read(CHUNK):
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


def sliced_bytes(entry: TensorEntry, part: Slice | None) -> int:
    """Bytes that are kept of a tensor."""
    if part is None:
        return entry.nbytes
    return entry.nbytes // entry.shape[part.axis] * len(part.kept)


def sliced_shape(entry: TensorEntry, part: Slice | None) -> tuple[int, ...]:
    """The shape of what is kept of a tensor."""
    if part is None:
        return entry.shape
    return (*entry.shape[: part.axis], len(part.kept), *entry.shape[part.axis + 1 :])


def _plan_shards(
    model: ModelFiles, slices: Slices, max_shard_bytes: int
) -> Iterable[list[tuple[TensorEntry, int]]]:
    shard: list[tuple[TensorEntry, int]] = []
    used = _HEADER_BYTES
    for entry in model.tensors.values():
        length = sliced_bytes(entry, slices[entry.name])
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
        header[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(sliced_shape(entry, slices[entry.name])),
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
    buffer = memoryview(bytearray(CHUNK))
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


def _runs(entry: TensorEntry, part: Slice | None) -> Iterator[tuple[int, int]]:
    """Offset and length of every run of bytes that is kept."""
    if part is None:
        yield entry.start, entry.nbytes
        return
    outer = math.prod(entry.shape[: part.axis])
    stride = entry.nbytes // (outer * entry.shape[part.axis])
    for block in range(outer):
        first = entry.start + block * stride * entry.shape[part.axis]
        for index in part.kept:
            yield first + index * stride, stride


def _chunks(start: int, length: int) -> Iterator[tuple[int, int]]:
    for at in range(start, start + length, CHUNK):
        yield at, min(CHUNK, start + length - at)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
