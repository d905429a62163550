"""Text for a terminal: the one place that decides on widths, colours and how a table looks.

On a terminal a table is as wide as that and long cells are folded; a pipe or a file gets every
cell whole. Colour is for terminals on which NO_COLOR is unset.
"""

from __future__ import annotations

import io
import os
import shutil
import sys
from collections.abc import Collection, Iterable, Sequence

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from eaft_prune.report.text import printable

MIN_WIDTH = 90
_WHOLE = 10_000  # columns where nobody looks


def table(
    heads: Sequence[str],
    rows: Iterable[Sequence[str | Text]] = (),
    *,
    right: Collection[str] = (),
    most: int | None = None,
) -> Table:
    """A table; cells under `right` align right and stay whole, the others are folded.

    most: columns that those others may take, beyond which they end in an ellipsis; such a table
    has one space between columns instead of three.
    """
    padding = (0, 0 if most else 1)
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=padding, show_edge=False)
    for number, head in enumerate(heads):
        if head in right:
            made.add_column(head, justify="right", no_wrap=True)
        elif most:
            made.add_column(head, overflow="ellipsis", max_width=most)
        else:
            made.add_column(head, overflow="fold", no_wrap=number == 0)
    for row in rows:
        add_row(made, row)
    return made


def add_row(table: Table, cells: Sequence[str | Text], style: str | None = None) -> None:
    """Add a row of plain text, which may hold what repaints a terminal, and of styled text."""
    shown = (Text(printable(cell)) if isinstance(cell, str) else cell for cell in cells)
    table.add_row(*shown, style=style)


def rendered(*parts: RenderableType, width: int | None = None, color: bool | None = None) -> str:
    """Parts one below the other as text, without spaces at line ends and the last line's end.

    width: None is the terminal's; never below 90. color: None is the terminal's.
    """
    if color is None:
        color = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    columns = shutil.get_terminal_size((_WHOLE, 24)).columns if width is None else width
    out = io.StringIO()
    console = Console(
        file=out,
        width=max(columns, MIN_WIDTH),
        force_terminal=color,
        color_system="standard" if color else None,
        highlight=False,
        emoji=False,
        legacy_windows=False,
    )
    for part in parts:
        console.print(part, soft_wrap=isinstance(part, Text))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()).rstrip()


def listing(
    heads: Sequence[str], rows: Iterable[Sequence[str]], *, right: Collection[str] = ()
) -> str:
    """Rows of plain text as a table."""
    return rendered(table(heads, rows, right=right))
