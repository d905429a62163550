"""Run a stage once: key -> directory, atomic rename, record.json."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import logging
import shutil
import time
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from filelock import FileLock

from eaft_prune.core.digests import canonical_json, digest, file_digest
from eaft_prune.core.files import DENIED, sync
from eaft_prune.core.outcome import StageRecord
from eaft_prune.core.step import Step
from eaft_prune.core.types import STORED, UserError

T = TypeVar("T")
log = logging.getLogger(__name__)

RECORD = "record.json"
DRAFT = ".draft"
_DIGEST = "record"  # of the record's other entries
ARRAYS = "arrays.safetensors"
_VALUES = "values.json"
FILES = (ARRAYS, _VALUES, RECORD)


@dataclass(frozen=True)
class Stored(Generic[T]):
    """One stage's output: its record now, its value when somebody asks."""

    record: StageRecord
    kind: type[T]

    @property
    def digest(self) -> str:
        """Digest of the output's bytes: the input digest of every stage that reads it."""
        return self.record.output_digest

    @cached_property
    def value(self) -> T:
        return load(self.record.path, self.kind)


@dataclass(frozen=True)
class Store:
    """Stage outputs under `root`, addressed by what they were made from."""

    root: Path

    def run(self, step: Step[T]) -> Stored[T]:
        """The step's output: from the store if its key is there and whole, else computed.

        The output appears under its key by one rename, so a killed run leaves nothing that reads as
        good; an output whose bytes no longer match its record is removed and made again. Processes
        that want the same key wait for each other. A store that cannot be written is read; raises
        UserError where it lacks the output.
        """
        home = self.root / step.stage / step.key
        lock = lock_of(home)
        try:
            home.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except OSError as error:
            if error.errno not in DENIED:
                raise
            return Stored(self._found(step, home, error), step.kind)
        try:
            record = _read_record(step.name, home)
            if record is None:
                started = time.perf_counter()
                value = step.compute()
                seconds = time.perf_counter() - started
                _write(home, value, step.identity, seconds, step.facts(value, seconds))
                record = _read_record(step.name, home)
                assert record is not None, f"{home} was written and cannot be read"
                record = dataclasses.replace(record, cached=False)
        finally:
            lock.release()
        return Stored(record, step.kind)

    def _found(self, step: Step[Any], home: Path, denied: OSError) -> StageRecord:
        why = f"runtime.store_dir = {str(self.root)!r} cannot be written ({denied.strerror})"
        try:
            return _as_record(step.name, home)
        except FileNotFoundError:
            raise UserError(f"{why} and has no {step.name} of these settings") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{why}, and its {step.name} is damaged: {error}") from None

    def holds(self, step: Step[Any]) -> bool:
        """Whether `run` would find the step's output, and find it whole."""
        return damage(self.root / step.stage / step.key) is None

    def outputs(self) -> list[Path]:
        """The directory of every stage output, whole or not; drafts of unfinished ones left out."""
        homes = self.root.glob("[!.]*/*")
        return sorted(home for home in homes if home.is_dir() and home.suffix != DRAFT)

    def drafts(self) -> list[Path]:
        """What runs are writing, or left when they died."""
        return sorted(self.root.glob(f"[!.]*/*{DRAFT}"))


def lock_of(home: Path) -> FileLock:
    """The lock under which an output is made."""
    return FileLock(f"{home}.lock")


def damage(home: Path) -> str | None:
    """What is wrong with an output, or None if it is whole."""
    try:
        read_record(home)
    except (OSError, ValueError) as error:
        return str(error)
    return None


def read_record(home: Path) -> dict[str, Any]:
    """The record of an output; raises OSError or ValueError unless every byte is as written."""
    record = json.loads((home / RECORD).read_text())
    if not isinstance(record, dict) or record.pop(_DIGEST, None) != _record_digest(record):
        raise ValueError(f"{RECORD} does not match its own digest")
    for name, sha in record["files"].items():
        if file_digest(home / name) != sha:
            raise ValueError(f"{name} does not match its digest")
    return record


def save(directory: Path, value: Any) -> None:
    """Write a dataclass of arrays and plain values as one safetensors and one JSON file."""
    from safetensors.numpy import save_file

    arrays: dict[str, np.ndarray[Any, Any]] = {}
    values: dict[str, Any] = {}
    _flatten(value, "", arrays, values)
    (directory / _VALUES).write_text(canonical_json(values))
    if arrays:
        contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        save_file(contiguous, directory / ARRAYS)
        # safetensors lets only the owner read, and a store may be shared
        shutil.copymode(directory / _VALUES, directory / ARRAYS)


def load(directory: Path, kind: type[T]) -> T:
    """Read back what `save` wrote of a `kind`."""
    from safetensors.numpy import load_file

    path = directory / ARRAYS
    arrays = load_file(path) if path.exists() else {}
    return typing.cast(T, _build(kind, "", arrays, json.loads((directory / _VALUES).read_text())))


def _as_record(stage: str, home: Path) -> StageRecord:
    record = read_record(home)
    return StageRecord(
        stage=stage,
        key=home.name,
        cached=True,
        seconds=record["seconds"],
        output_digest=digest(record["files"]),
        path=home,
        facts=record["facts"],
    )


def _read_record(stage: str, home: Path) -> StageRecord | None:
    if not home.exists():
        return None
    try:
        return _as_record(stage, home)
    except (OSError, ValueError) as error:
        log.warning("%s is damaged (%s): removing it and running %s again", home, error, stage)
        shutil.rmtree(home)
        return None


def _write(
    home: Path,
    value: Any,
    identity: Mapping[str, Any],
    seconds: float,
    facts: Mapping[str, Any],
) -> None:
    draft = home.with_name(home.name + DRAFT)  # the lock is held: an older draft is a dead run's
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    try:
        save(draft, value)
        files = {item.name: file_digest(item) for item in sorted(draft.iterdir())}
        record = {
            "identity": identity,
            "files": files,
            "seconds": seconds,
            "facts": dict(facts),
            "finished": time.time(),
        }
        record[_DIGEST] = _record_digest(record)
        (draft / RECORD).write_text(json.dumps(record, indent=1))
        for item in draft.iterdir():
            sync(item)
        draft.rename(home)
        sync(home.parent)
    except Exception as error:
        if _is_full(error):
            raise UserError(
                f"the disk of {home.parent.parent} is full: free some, or set runtime.store_dir"
            ) from error
        raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _record_digest(record: Mapping[str, Any]) -> str:
    # of the text json writes: facts may hold what canonical JSON refuses
    text = json.dumps({k: v for k, v in record.items() if k != _DIGEST}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _is_full(error: Exception) -> bool:
    # safetensors' writer is Rust: it knows the errno only as text
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if isinstance(error, OSError) and error.errno in full:
        return True
    return any(f"os error {number}" in str(error) for number in full)


def _flatten(
    value: Any, prefix: str, arrays: dict[str, np.ndarray[Any, Any]], values: dict[str, Any]
) -> None:
    for field in dataclasses.fields(value):
        item, name = getattr(value, field.name), prefix + _name(field)
        if isinstance(item, np.ndarray):
            arrays[name] = item
        elif dataclasses.is_dataclass(item):
            _flatten(item, name + ".", arrays, values)
        else:
            values[name] = item


def _build(kind: Any, prefix: str, arrays: Mapping[str, Any], values: Mapping[str, Any]) -> Any:
    fields = {}
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        name = prefix + _name(field)
        if dataclasses.is_dataclass(hints[field.name]):
            fields[field.name] = _build(hints[field.name], name + ".", arrays, values)
        else:
            fields[field.name] = arrays[name] if name in arrays else _value(field, name, values)
    return kind(**fields)


def _value(field: dataclasses.Field[Any], name: str, values: Mapping[str, Any]) -> Any:
    if name not in values and field.default is not dataclasses.MISSING:
        return field.default  # written before there was such a field
    return _tuples(values[name])


def _name(field: dataclasses.Field[Any]) -> str:
    name: str = field.metadata.get(STORED, field.name)
    return name


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
