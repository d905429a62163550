"""CSV: comma-separated, quoted where needed, names in the first line; every value is text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from eaft_prune.packs.pack_file import Kind, PackFile, arrow_errors, kind_of

_BLOCK = 16 << 20  # bytes; a row must fit into it


def _opened(file: PackFile, only: str | None = None) -> Any:
    """Batches of one column as text, or of all columns as they seem."""
    from pyarrow import csv, string

    converted = csv.ConvertOptions()
    if only is not None:
        converted = csv.ConvertOptions(
            include_columns=[only], column_types={only: string()}, strings_can_be_null=False
        )
    return csv.open_csv(
        str(file.path),
        csv.ReadOptions(block_size=_BLOCK),
        csv.ParseOptions(newlines_in_values=True),
        converted,
    )


def kind(file: PackFile) -> Kind:
    """text; raises UserError where the column is not there."""
    return kind_of(file, [(name, "text") for name in names(file)])


def names(file: PackFile) -> list[str]:
    """Its columns."""
    with arrow_errors(file, "is not a CSV file"), _opened(file) as opened:
        return list(opened.schema.names)


def count(file: PackFile) -> int:
    """Number of rows: the file is read."""
    return sum(1 for _ in rows(file))


def rows(file: PackFile) -> Iterator[Any]:
    """The column's values in file order."""
    kind(file)  # pyarrow takes the first of two columns of one name
    with arrow_errors(file, "is damaged"), _opened(file, file.column) as opened:
        for batch in opened:
            yield from batch.column(0).to_pylist()
