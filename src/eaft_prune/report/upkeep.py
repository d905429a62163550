"""Tables of task=doctor and task=gc for a terminal."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from eaft_prune.core.types import Finding
from eaft_prune.report.text import printable

WIDTH = 120


def findings_table(findings: Sequence[Finding]) -> str:
    """One line a finding; below, the commands that mend, whole so that they can be copied."""
    table = _table(("check", "state", "found"))
    for one in findings:
        state = "ok" if one.ok else "mended" if one.mended else "WRONG"
        table.add_row(one.check, state, Text(printable(one.what), overflow="fold"))
    commands = dict.fromkeys(one.mend for one in findings if not (one.ok or one.mended))
    lines = ["", "to mend:", *(f"  {command}" for command in commands if command)]
    return _text(table) + ("\n".join(lines) + "\n" if any(commands) else "")


def garbage_table(
    going: Sequence[tuple[str, str, int, float]], kept: Sequence[tuple[str, int]]
) -> str:
    """What goes (what, path, bytes, age in days), and what stays by reason (reason, bytes)."""
    table = _table(("what", "MB", "days", "path"))
    for what, path, size, age in going:
        place = Text(printable(path), overflow="fold")
        table.add_row(what, f"{size / 1e6:,.2f}", f"{age:,.1f}", place)
    reasons, counts = Counter[str](), Counter[str]()
    for reason, size in kept:
        reasons[reason] += size
        counts[reason] += 1
    stays = _table(("stays", "MB", "because"))
    for reason, size in reasons.most_common():
        stays.add_row(str(counts[reason]), f"{size / 1e6:,.2f}", Text(printable(reason)))
    return "\n".join(_text(one) for one in (table, stays) if one.row_count)


def _table(columns: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=0, show_edge=False)
    for name in columns:
        table.add_column(name, justify="right" if name in ("MB", "days") else "left")
    return table


def _text(table: Table) -> str:
    out = io.StringIO()
    Console(file=out, width=WIDTH, highlight=False, emoji=False).print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()).rstrip() + "\n"
