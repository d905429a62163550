"""A pack's file, and what its column may hold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from eaft_prune.core.text import shortened
from eaft_prune.core.types import UserError

Kind = Literal["text", "messages"]


@dataclass(frozen=True)
class PackFile:
    """A pack's file and the column (packs.text_column) that holds its rows."""

    name: str
    path: Path
    column: str

    def error(self, what: str) -> UserError:
        """The mistake, with the pack and the file in front."""
        return UserError(f"pack {self.name}: {self.path} {what}")


def kind_of(file: PackFile, columns: Sequence[tuple[str, str]]) -> Kind:
    """text or messages, given every column's name with what it holds; raises UserError if neither.

    A name that stands twice is refused where it is the one to read.
    """
    held = [what for name, what in columns if name == file.column]
    if held == ["text"]:
        return "text"
    if held == ["messages"]:
        return "messages"
    there = ", ".join(f"{name} ({what})" for name, what in columns)
    if len(held) > 1:
        raise file.error(f"has {len(held)} columns named {file.column!r}: rename one")
    wrong = f"holds {held[0]} in column {file.column!r}" if held else f"has no {file.column!r}"
    raise file.error(
        f"{wrong}: packs.text_column names a column of text or of messages; it has "
        f"{shortened(there, 300)}"
    )


@contextmanager
def arrow_errors(file: PackFile, what: str) -> Iterator[None]:
    """What pyarrow raises inside, as a UserError that says `what` of the file."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:  # names of columns, too
        raise file.error(f"{what}: {shortened(str(error).splitlines()[0], 200)}") from None


def shown(value: Any) -> str:
    """A value for a message, of which one of 30,000 characters takes one line too."""
    return "nothing (null)" if value is None else shortened(repr(value))
