"""Parquet: one column, batch by batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from eaft_prune.core.text import shortened
from eaft_prune.packs.pack_file import Kind, PackFile, arrow_errors, kind_of

if TYPE_CHECKING:
    import pyarrow

_ROWS_AT_ONCE = 256
_BUFFER = 1 << 20  # bytes read at a time of a column of a row group


@contextmanager
def _opened(file: PackFile) -> Iterator[Any]:
    import pyarrow.parquet

    with file.path.open("rb") as stream:
        with arrow_errors(file, "is not a parquet file, or was cut short"):
            opened = pyarrow.parquet.ParquetFile(stream, pre_buffer=False, buffer_size=_BUFFER)
        yield opened


def kind(file: PackFile) -> Kind:
    """What the column holds, by the schema."""
    with _opened(file) as opened, arrow_errors(file, "is damaged"):
        return kind_of(file, [(field.name, _held(field.type)) for field in opened.schema_arrow])


def names(file: PackFile) -> list[str]:
    """Its columns."""
    with _opened(file) as opened, arrow_errors(file, "is damaged"):
        return list(opened.schema_arrow.names)


def _held(kind: pyarrow.DataType) -> str:
    """text, messages, or the type as pyarrow writes it."""
    from pyarrow import types

    inner = kind.value_type if types.is_dictionary(kind) else kind
    if types.is_string(inner) or types.is_large_string(inner) or types.is_string_view(inner):
        return "text"
    lists = types.is_list(kind) or types.is_large_list(kind)
    structs = lists and types.is_struct(kind.value_type)
    if structs and "role" in {field.name for field in kind.value_type}:
        return "messages"
    return shortened(str(kind), 40)


def count(file: PackFile) -> int:
    """Number of rows, from the footer."""
    with _opened(file) as opened:
        return int(opened.metadata.num_rows)


def rows(file: PackFile) -> Iterator[Any]:
    """The column's values in file order."""
    index = 0
    with _opened(file) as opened, arrow_errors(file, "is damaged"):
        for batch in opened.iter_batches(_ROWS_AT_ONCE, columns=[file.column]):
            for value in batch.column(file.column):  # by name: `text` also selects `text.x`
                try:
                    yield value.as_py()
                except UnicodeDecodeError as error:
                    raise file.error(
                        f"row {index}: {file.column!r} is not UTF-8: {error}"
                    ) from None
                index += 1
