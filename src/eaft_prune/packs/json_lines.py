"""JSON lines: an object a line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from eaft_prune.core.foreign import is_deep
from eaft_prune.packs.pack_file import Kind, PackFile, kind_of, shown


def _objects(file: PackFile) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number, counted from 1, and object; empty lines are none."""
    with file.path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                raise file.error(f"line {number} is not UTF-8: {error}") from None
            except (ValueError, RecursionError) as error:
                raise file.error(f"line {number} is not JSON: {error}") from None
            if is_deep(value):
                raise file.error(f"line {number} is nested too deep")
            if not isinstance(value, dict):
                raise file.error(f"line {number} holds {shown(value)}, not an object")
            yield number, value


def kind(file: PackFile) -> Kind:
    """What the column holds, by the first row."""
    for _, value in _objects(file):
        return kind_of(file, [(name, _held(item)) for name, item in value.items()])
    raise file.error("has no rows")


def names(file: PackFile) -> list[str]:
    """The keys of the first row."""
    return list(next(_objects(file), (0, {}))[1])


def _held(value: Any) -> str:
    if isinstance(value, str):
        return "text"
    if isinstance(value, list) and value and isinstance(value[0], dict) and "role" in value[0]:
        return "messages"
    return "null" if value is None else type(value).__name__


def count(file: PackFile) -> int:
    """Number of lines that are not empty."""
    with file.path.open("rb") as stream:
        return sum(1 for line in stream if line.strip())


def rows(file: PackFile) -> Iterator[Any]:
    """The column's values in file order."""
    for number, value in _objects(file):
        if file.column not in value:
            raise file.error(f"line {number} has no {file.column!r} (packs.text_column)")
        yield value[file.column]
