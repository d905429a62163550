"""Facts of a task as lines on a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from eaft_prune.report.text import number


def facts_text(facts: Mapping[str, Any]) -> str:
    """A line a fact; a mapping of mappings as a table of them, under its name."""
    lines = []
    for name, value in facts.items():
        if _is_table(value):
            lines += ["", *_table(name, value), ""]
        else:
            lines.append(f"{name:<24} {value}")
    return "\n".join(lines)


def _is_table(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(isinstance(row, Mapping) for row in value.values())
    )


def _table(name: str, rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    cells = [[name, *columns]]
    cells += [
        [key, *(_cell(row.get(column, "")) for column in columns)] for key, row in rows.items()
    ]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns) + 1)]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]


def _cell(value: Any) -> str:
    return number(value, 4) if isinstance(value, float) else str(value)
