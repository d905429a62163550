"""A frontier as one HTML file that opens from disk, without a network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from eaft_prune.core.frontier import Frontier, Point
from eaft_prune.report.elements import numeral, scroll, status, text
from eaft_prune.report.fragments import fact_list, provenance
from eaft_prune.report.frontier import HEADS, NOTE, RIGHT, frontier_rows, in_order, sentence, size
from eaft_prune.report.page import Words, page

_WORDS = Words(
    question="how far can it go?",
    skip_to="points",
    skipped="every point",
    complete="The table above is complete; the plot needs",
)


def frontier_html(frontier: Frontier, facts: Mapping[str, Any], about: Mapping[str, str]) -> str:
    """The sentence, the plot of GB against Δ PPL, every point, provenance."""
    answer = frontier.answer
    verdict = "INCONCLUSIVE" if answer is None else answer.status
    word = "No size passes" if answer is None else f"{size(answer.gb)} pass"
    parts = {
        "about": fact_list(about, "about"),
        "word": f'<span class="status {verdict.lower()}">{text(word)}</span>',
        "sentence": text(sentence(frontier)),
        "table": _table(frontier),
        "note": text(NOTE),
        "provenance": provenance(facts),
    }
    title = f"How far {frontier.model} can be pruned: {word}"
    return page("frontier", title, _WORDS, _data(frontier), parts)


def _table(frontier: Frontier) -> str:
    head = "".join(f'<th scope="col"{_class(name)}>{text(name)}</th>' for name in HEADS)
    rows = "".join(f"<tr>{_cells(row)}</tr>" for row in frontier_rows(frontier))
    return scroll("Every point", f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody>")


def _cells(row: tuple[str, ...]) -> str:
    cells = []
    for name, cell in zip(HEADS, row, strict=True):
        shown = (
            status(cell) if name == "verdict" else text(numeral(cell) if name in RIGHT else cell)
        )
        cells.append(f"<td{_class(name)}>{shown}</td>")
    return "".join(cells)


def _class(name: str) -> str:
    return ' class="n"' if name in RIGHT else ""


def _data(frontier: Frontier) -> dict[str, Any]:
    lines: dict[str, list[Point]] = {}
    for point in in_order(frontier.points):
        lines.setdefault(f"{point.method}, {point.rows}", []).append(point)
    return {
        "limit": 100 * frontier.limit,
        "base": frontier.base_gb,
        "experts": frontier.n_experts,
        "lines": [
            {
                "name": name,
                "proof": points[0].rows == "proof",
                "gb": [point.gb for point in points],
                "keep": [point.keep_n for point in points],
                "growth": [100 * point.growth for point in points],
                "low": [_percent(point.low, point.growth) for point in points],
                "high": [_percent(point.high, point.growth) for point in points],
                "status": [point.status for point in points],
            }
            for name, points in lines.items()
        ],
    }


def _percent(bound: float | None, growth: float) -> float:
    """A bound in percent; the number itself where there is none."""
    return 100 * (growth if bound is None else bound)
