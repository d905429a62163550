"""A frontier for people: one sentence, a table, Markdown, and rows for programs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from eaft_prune.core.frontier import Frontier, Point
from eaft_prune.report.markdown import inline
from eaft_prune.report.markdown import table as pipe_table
from eaft_prune.report.terminal import listing
from eaft_prune.report.text import number, percent

HEADS = ("rows", "method", "experts", "GB", "verdict", "Δ PPL", "bounds", "tokens", "fails by")
RIGHT = ("experts", "GB", "Δ PPL", "bounds", "tokens")
_ROWS = {"search": "profiling", "proof": "unseen"}


def sentence(frontier: Frontier) -> str:
    """What was found, to be forwarded: size, experts, loss, evidence, and where it ends."""
    what, answer = frontier.model, frontier.answer
    tried = sorted({point.keep_n for point in frontier.points if point.keep_n is not None})
    if answer is None:
        return (
            f"{what} could not be shown to pass {frontier.gate} with any of "
            f"{_listed(tried)} of {frontier.n_experts} experts a layer."
        )
    share = 1 - answer.gb / frontier.base_gb
    sure = "" if frontier.confidence is None else f" at {percent(frontier.confidence)} confidence"
    said = (
        f"{what} keeps {answer.keep_n} of {frontier.n_experts} experts a layer ({answer.method}): "
        f"{size(answer.gb)} instead of {size(frontier.base_gb)} ({-100 * share:+.0f}%), and passes "
        f"{frontier.gate}{sure}, perplexity {growth(answer)}{_between(answer)}, on "
        f"{answer.tokens:,} tokens of {answer.conversations:,} conversations that it was not "
        "chosen on."
    )
    below = [point for point in frontier.points if _is_below(point, answer)]
    if below:
        nearest = max(point.keep_n or 0 for point in below)
        how = {point.method: point.status for point in below if point.keep_n == nearest}
        each = ", ".join(f"{method} {status}" for method, status in how.items())
        said += f" With {nearest} no method could be shown to pass ({each})."
    return said


def frontier_rows(frontier: Frontier) -> Iterator[tuple[str, ...]]:
    """A row a point as texts under HEADS: the search from large to small, then the proof."""
    for point in in_order(frontier.points):
        keep = "" if point.keep_n is None else f"{point.keep_n}"
        yield (
            _ROWS[point.rows], point.method, keep, number(point.gb, 4), point.status,
            growth(point), _bounds(point), f"{point.tokens:,}",
            " ".join((*point.failed, *(f"{label}?" for label in point.undecided))),
        )  # fmt: skip


def in_order(points: Sequence[Point]) -> list[Point]:
    """Methods in the order they were tried, large sizes first; the proof below the search."""
    methods = list(dict.fromkeys(point.method for point in points))
    return sorted(
        points, key=lambda p: (p.rows == "proof", methods.index(p.method), -(p.keep_n or 0))
    )


def frontier_table(frontier: Frontier) -> str:
    """For a terminal."""
    return listing(HEADS, frontier_rows(frontier), right=RIGHT)


def frontier_markdown(frontier: Frontier) -> str:
    """The sentence and the table, for a pull request."""
    rows = [tuple(inline(cell) for cell in row) for row in frontier_rows(frontier)]
    lines = [
        f"# How far {inline(frontier.model)} can be pruned",
        "",
        inline(sentence(frontier)),
        "",
    ]
    lines += pipe_table(HEADS, rows, left=2)
    return "\n".join([*lines, NOTE, ""])


NOTE = (
    "Bounds are one-sided, each at the confidence of its verdict. Sizes are tried on profiling "
    "rows with early looks; one that is open there with every estimate within its limit may go on "
    "to the proof. Repaired plans were fitted to such rows, so there they look better "
    "than they are. What is proven is proven on rows that neither ranking, repair nor search saw."
)


def frontier_frame(frontier: Frontier) -> Any:
    """A pandas frame, a row a point, numbers as numbers."""
    import pandas

    rows = [
        {
            "rows": point.rows, "method": point.method, "keep_n": point.keep_n, "gb": point.gb,
            "verdict": point.status, "holds": point.holds, "dppl_percent": 100 * point.growth,
            "low_percent": None if point.low is None else 100 * point.low,
            "high_percent": None if point.high is None else 100 * point.high,
            "limit_percent": 100 * frontier.limit, "tokens": point.tokens,
            "conversations": point.conversations, "failed": " ".join(point.failed),
            "undecided": " ".join(point.undecided), "plan": point.plan or "",
            "path": "" if point.path is None else str(point.path),
        }
        for point in in_order(frontier.points)
    ]  # fmt: skip
    return pandas.DataFrame(rows)


def size(gb: float) -> str:
    """Gigabytes, or megabytes where those are less than a tenth of one."""
    return f"{gb:,.1f} GB" if gb >= 0.1 else f"{1000 * gb:,.1f} MB"


def growth(point: Point) -> str:
    """PPL / PPL_base - 1 in percent."""
    return f"{100 * point.growth:+.2f}%"


def _bounds(point: Point) -> str:
    if point.low is None or point.high is None:
        return ""
    return f"{100 * point.low:+.2f}% to {100 * point.high:+.2f}%"


def _between(point: Point) -> str:
    bounds = _bounds(point)
    return f" ({bounds})" if bounds else ""


def _is_below(point: Point, answer: Point) -> bool:
    return point.keep_n is not None and answer.keep_n is not None and point.keep_n < answer.keep_n


def _listed(sizes: Sequence[int]) -> str:
    return ", ".join(map(str, sizes[:-1])) + " or " * (len(sizes) > 1) + str(sizes[-1])
