"""What base and candidate answered to tasks, as every report shows it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from eaft_prune.core.harness import Scored, TaskReport
from eaft_prune.core.verdict import RECOVERY, Estimate
from eaft_prune.report.elements import numeral, scroll, small, text
from eaft_prune.report.summary import CandidateSummary
from eaft_prune.report.text import number, percent, printable

HEADS = ("task", "metric")
COLUMNS = (
    "samples", "base", "candidate", "recovery", "Δ", "base alone", "candidate alone", "McNemar p",
    "settled by",
)  # fmt: skip
NOTE = (
    "Recovery is the candidate's score as a share of the base's; bounds are over samples, the two "
    "paired. Samples that one alone answers right are the flips. Settled by: samples that would "
    "decide the gate's check of the recovery, if it is undecided"
)


def lines(summary: CandidateSummary) -> Iterator[tuple[str, str, list[tuple[str, str]]]]:
    """Task, metric, and a number with its bounds or nothing for each of COLUMNS."""
    for task, report in summary.tasks.items():
        for place, (metric, one) in enumerate(report.scored.items()):
            settled = summary.settled_by(RECOVERY, task) if place == 0 else ""
            yield task, metric, [*_cells(one), (settled, "")]


def _cells(one: Scored) -> list[tuple[str, str]]:
    recovery, delta = one.changes.get(RECOVERY), one.changes["dtask"]
    cells = [
        (f"{one.changes.rows:,}", ""),
        (percent(one.base), ""),
        (percent(one.candidate), ""),
        ("-", "") if recovery is None else _shares(recovery, 1),
        _shares(delta, 0),
    ]
    if one.flips is None:
        return [*cells, *[("-", "")] * 3]
    flips = one.flips
    counts = (f"{flips.base_only:,}", f"{flips.candidate_only:,}", f"{flips.p_value:.3g}")
    return [*cells, *((count, "") for count in counts)]


def _shares(estimate: Estimate, of: int) -> tuple[str, str]:
    value, low, high = (
        f"{number(100 * (of + x), 2, signed=of == 0)}%"
        for x in (estimate.value, estimate.low, estimate.high)
    )
    return value, f"{low} to {high}"


def left_out(tasks: Mapping[str, TaskReport]) -> str:
    """Metrics that are not compared; empty where all are."""
    found = [f"{', '.join(one.left_out)} of {task}" for task, one in tasks.items() if one.left_out]
    if not found:
        return ""
    return f"Not compared, as no number of a sample or less is better: {'; '.join(found)}"


def sentences(summary: CandidateSummary) -> Iterator[str]:
    """Each task in a line, by the metric that gates read."""
    for task, report in summary.tasks.items():
        metric, one = report.first
        recovery = one.changes.get(RECOVERY)
        share = ""
        if recovery is not None:
            value, ends = _shares(recovery, 1)
            share = f", recovery {value} ({ends})"
        flips = one.flips
        counts = "" if flips is None else f", {flips.base_only} lost, {flips.candidate_only} gained"
        more = summary.settled_by(RECOVERY, task)
        counts += f"; {more} samples would settle it" if more else ""
        yield (
            f"{task}: {metric} {percent(one.base)} to {percent(one.candidate)} of "
            f"{one.changes.rows:,} samples{share}{counts}"
        )


def tasks_table(summary: CandidateSummary, base: str) -> str:
    """The same as HTML."""
    head = "".join(f'<th scope="col">{text(name)}</th>' for name in HEADS)
    head += "".join(f'<th scope="col" class="n">{text(name)}</th>' for name in COLUMNS)
    body = ""
    for task, metric, cells in lines(summary):
        found = "".join(
            f'<td class="n">{numeral(value)}{small(numeral(ends))}</td>' for value, ends in cells
        )
        name = f'<th scope="row">{text(printable(task))}</th><td>{text(printable(metric))}</td>'
        body += f"<tr>{name}{found}</tr>"
    table = scroll(
        f"Tasks of {summary.label}", f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    )
    more = left_out(summary.tasks)
    note = f"{NOTE}. {more}." if more else f"{NOTE}."
    return f'{table}<p class="note">{text(printable(note))}</p>'
