"""Facts of a task as lines on a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from eaft_prune.report.terminal import listing
from eaft_prune.report.text import number


def facts_text(facts: Mapping[str, Any]) -> str:
    """A line a fact; a mapping of mappings as a table of them, under its name."""
    lines = []
    for name, value in facts.items():
        if _is_table(value):
            lines += ["", _table(name, value), ""]
        else:
            lines.append(f"{name:<24} {value}")
    return "\n".join(lines)


def _is_table(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(isinstance(row, Mapping) for row in value.values())
    )


def _table(name: str, rows: Mapping[str, Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    cells = [[key, *(_cell(row.get(c, "")) for c in columns)] for key, row in rows.items()]
    return listing((name, *columns), cells, right=columns)


def _cell(value: Any) -> str:
    return number(value, 4) if isinstance(value, float) else str(value)
