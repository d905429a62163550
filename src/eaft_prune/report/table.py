"""The comparison on a terminal."""

from __future__ import annotations

import io
import os
import shutil
import sys
from collections.abc import Mapping

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from eaft_prune.core.types import UNION, Comparison, Status
from eaft_prune.report.summary import (
    METRICS,
    CandidateSummary,
    Row,
    check_label,
    leaderboard,
    ordered_keys,
    reports_of,
    summarise,
)
from eaft_prune.report.text import (
    RESULTS,
    agreement_sentence,
    bounds_label,
    check_numbers,
    metric_numbers,
    number,
    printable,
    reach,
    verdict_sentence,
    worst_pack_sentence,
)

MIN_WIDTH = 90
_STYLES: Mapping[Status, str] = {"PASS": "green", "FAIL": "red", "INCONCLUSIVE": "yellow"}


def comparison_table(
    comparison: Comparison, *, width: int | None = None, color: bool | None = None
) -> str:
    """Metrics, checks and verdict of every candidate, as lines of at most `width` columns.

    A comparison without candidates shows the base model's metrics alone. width: None is the
    terminal's, within 90..120. color: None is yes iff stdout is a terminal and NO_COLOR is unset.
    Raises ValueError where the comparison is empty or does not fit together.
    """
    if color is None:
        color = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    columns = min(shutil.get_terminal_size((100, 24)).columns, 120) if width is None else width
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
    base = printable(comparison.base.model)
    if not comparison.candidates:
        console.print(_base_alone(comparison))
    summaries = summarise(comparison) if comparison.candidates else ()
    for summary in summaries:
        console.print(Text(f"{printable(summary.label)} against {base}", style="bold"))
        for part in (_metrics(summary, base), _checks(summary)):
            console.print()
            console.print(part)
        console.print()
        for sentence in (worst_pack_sentence(summary), agreement_sentence(summary)):
            if sentence:
                console.print(Text(printable(sentence)), soft_wrap=True)
        console.print(_verdict(summary), soft_wrap=True)
        console.print()
    if len(summaries) > 1:
        console.print(_leaderboard(summaries))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()).rstrip() + "\n"


def _base_alone(comparison: Comparison) -> Table:
    table = _table(("pack", "length", "model"), (*(metric.label for metric in METRICS), "tokens"))
    label = printable(comparison.base.model)
    reports = reports_of(comparison.base, comparison.reports)
    for key in ordered_keys(reports):
        row = Row(*key, reports[key], reports[key], None)
        numbers = [metric_numbers(metric, row.values(metric))[0] for metric in METRICS]
        cells = [printable(row.pack), str(row.seq_len), label, *numbers]
        cells.append(f"{reports[key].scored_tokens:,}")
        table.add_row(*map(Text, cells), style="bold" if row.pack == UNION else None)
    return table


def _metrics(summary: CandidateSummary, base: str) -> Table:
    labels = (*(metric.label for metric in METRICS), "JS2D", "corrected", "tokens")
    table = _table(("pack", "length", "model"), labels)
    union = [row for row in summary.rows if row.pack == UNION]
    for row in summary.rows:
        for cells in _lines(row, base, printable(summary.label)):
            table.add_row(*cells, style="bold" if row.pack == UNION else None)
        if union and row is union[-1]:
            table.add_section()
    return table


def _lines(row: Row, base: str, candidate: str) -> list[list[Text]]:
    """Base, candidate, delta, and how far its bounds are."""
    numbers = [metric_numbers(metric, row.values(metric)) for metric in METRICS]
    errors = [reach(row.estimate(metric.check), metric.decimals) for metric in METRICS]
    first, second, delta = ([n[i] for n in numbers] for i in range(3))
    divergence = [number(row.candidate.js2d, 4), number(row.candidate.js2d_corrected, 4)]
    tokens = f"{row.candidate.scored_tokens:,}"
    lines = [
        [printable(row.pack), str(row.seq_len), base, *first, "", "", tokens],
        ["", "", candidate, *second, *divergence, ""],
        ["", "", "delta", *delta, "", "", ""],
    ]
    if any(errors):
        lines.append(["", "", "", *errors, "", reach(row.estimate("js2d"), 4), ""])
    return [[Text(cell) for cell in line] for line in lines]


def _checks(summary: CandidateSummary) -> Table:
    bounds = bounds_label(summary.verdict)
    table = _table(("check", "pack", "length"), ("value", bounds, "limit", "margin", "result"))
    for check in summary.verdict.checks:
        table.add_row(
            Text(check_label(check)),
            Text(printable(check.pack)),
            str(check.seq_len),
            *check_numbers(check),
            Text(RESULTS[check.outcome], style=_STYLES[check.outcome]),
        )
    return table


def _leaderboard(summaries: tuple[CandidateSummary, ...]) -> Table:
    table = _table(("candidate",), ("verdict", "failed", "undecided", "worst delta PPL"))
    for summary in leaderboard(summaries):
        verdict = summary.verdict
        failed = f"{len(verdict.failed_checks)} of {len(verdict.checks)}"
        delta = number(summary.dppl, 3, signed=True)
        undecided = str(len(verdict.undecided_checks))
        table.add_row(Text(printable(summary.label)), _status(summary), failed, undecided, delta)
    return table


def _table(left: tuple[str, ...], right: tuple[str, ...]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=0, show_edge=False)
    for label in left:
        table.add_column(label, overflow="ellipsis", max_width=24)
    for label in right:
        table.add_column(label, justify="right", no_wrap=True)
    return table


def _status(summary: CandidateSummary) -> Text:
    return Text(summary.verdict.status, style=f"bold {_STYLES[summary.verdict.status]}")


def _verdict(summary: CandidateSummary) -> Text:
    return _status(summary).append(
        f"  {printable(verdict_sentence(summary.verdict))}", style="none"
    )
