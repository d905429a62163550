"""One column of a pack's file, row by row: texts, or conversations as lists of messages.

The file is opened by its name, never as a pattern, and nothing but the column is decoded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import repeat
from typing import Any, Protocol

from eaft_prune.core.types import UserError
from eaft_prune.packs import csv, json_lines, parquet
from eaft_prune.packs.pack_file import Kind, PackFile, shown

Message = Mapping[str, Any]
Row = str | Sequence[Message]
Tools = Sequence[Mapping[str, Any]] | None  # that a conversation may call: JSON schemas

ANSWER = "answer"
TOOLS = "tools"
_LFS = b"version https://git-lfs"


class _Format(Protocol):
    """How rows are stored: what the column holds, how many there are, and they themselves."""

    def names(self, file: PackFile) -> list[str]: ...

    def kind(self, file: PackFile) -> Kind: ...

    def count(self, file: PackFile) -> int: ...

    def rows(self, file: PackFile) -> Iterator[Any]: ...


_FORMATS: Mapping[str, _Format] = {
    ".parquet": parquet,
    ".jsonl": json_lines,
    ".ndjson": json_lines,
    ".csv": csv,
}


def check_column(file: PackFile) -> Kind:
    """What the column holds, by the file's schema or first row; raises UserError if no rows."""
    return _format(file).kind(file)


def count_rows(file: PackFile) -> int:
    """Number of rows; raises UserError where there are none, or the file cannot be read."""
    count = _format(file).count(file)
    if count == 0:
        raise file.error("has no rows")
    return count


def read_texts(file: PackFile, render: Callable[[Sequence[Message]], str]) -> Iterator[str]:
    """The rows' texts in file order, streamed; `render` writes out what is a list of messages.

    Raises UserError at the first row that holds something else, or that `render` refuses.
    """
    for index, row in enumerate(read_rows(file)):
        try:
            yield row if isinstance(row, str) else render(row)
        except UserError as error:
            raise file.error(f"row {index}: {error}") from None


def read_answers(file: PackFile) -> list[str | None]:
    """What each row's last turn should answer: its `answer`, a text or a number; None: it has none.

    Empty where the file has no such column. Raises UserError where one holds something else.
    """
    own, form = replace(file, column=ANSWER), _format(file)
    if ANSWER not in form.names(own):
        return []
    found: list[str | None] = []
    for index, value in enumerate(form.rows(own)):
        if value is not None and not isinstance(value, str | int | float):
            raise file.error(f"row {index}: {ANSWER} holds {shown(value)}, no text and no number")
        found.append(None if value is None or value == "" else str(value))
    return found


def read_tools(file: PackFile) -> Iterator[Tools]:
    """What each row's assistant may call: its `tools`, a list of JSON schemas or that as a text.

    None for each where the file has no such column. UserError where one holds something else.
    """
    own, form = replace(file, column=TOOLS), _format(file)
    if TOOLS not in form.names(own):
        yield from repeat(None, form.count(file))
        return
    for index, value in enumerate(form.rows(own)):
        try:
            tools = json.loads(value) if isinstance(value, str) and value else value or None
        except (ValueError, RecursionError):
            tools = value
        if tools is not None and not _are_objects(tools):
            raise file.error(f"row {index}: {TOOLS} holds {shown(value)}, no list of JSON schemas")
        yield _without_null(tools)


def _are_objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def read_rows(file: PackFile) -> Iterator[Row]:
    """The rows in file order, streamed: texts or messages, without keys that are null.

    Raises UserError at the first row that holds something else.
    """
    kind = check_column(file)
    valid = _text if kind == "text" else _messages
    for index, value in enumerate(_format(file).rows(file)):
        yield valid(file, index, value)


def _format(file: PackFile) -> _Format:
    suffix = file.path.suffix.lower()
    if suffix not in _FORMATS:
        raise file.error(
            f"ends in {suffix or 'no suffix'}: packs are {', '.join(_FORMATS)} files; rename it to "
            "what it is"
        )
    with file.path.open("rb") as stream:
        if stream.read(len(_LFS)) == _LFS:
            raise file.error("is a Git LFS pointer, not the file itself: run `git lfs pull` there")
    return _FORMATS[suffix]


def _text(file: PackFile, index: int, value: Any) -> str:
    if not isinstance(value, str):
        raise file.error(f"row {index}: {file.column!r} holds {shown(value)}, not text")
    if not _encodable(value):
        raise file.error(f"row {index}: {file.column!r} holds half a character (a surrogate)")
    return value


def _messages(file: PackFile, index: int, value: Any) -> list[Message]:
    where = f"row {index}: {file.column!r} holds"
    if not isinstance(value, list) or not value:
        raise file.error(f"{where} {shown(value)}, not a list of messages")
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise file.error(f"{where} the message {shown(message)}, which has no role")
    if not _encodable(json.dumps(value, ensure_ascii=False, default=str)):
        raise file.error(f"{where} half a character (a surrogate)")
    # a struct of parquet has every key in every message: null there is absence in JSON
    return [_without_null(message) for message in value]


def _without_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_null(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_null(item) for item in value]
    return value


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
