"""The comparison on a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from eaft_prune.core.types import UNION
from eaft_prune.core.verdict import Comparison, Status
from eaft_prune.maths.metrics import JS2D, METRICS, Metric
from eaft_prune.report import tasks
from eaft_prune.report.divergence import worst_sentence
from eaft_prune.report.summary import (
    CandidateSummary,
    Row,
    columns,
    leaderboard,
    ordered_keys,
    reports_of,
    summarise,
)
from eaft_prune.report.terminal import add_row, rendered, table
from eaft_prune.report.text import (
    RESULTS,
    beside_sentence,
    bounds_label,
    check_numbers,
    evidence,
    interval,
    metric_numbers,
    missed_sentence,
    number,
    plain_sentences,
    printable,
    verdict_sentence,
    worst_pack_sentence,
)

_STYLES: Mapping[Status, str] = {"PASS": "green", "FAIL": "red", "INCONCLUSIVE": "yellow"}
_KEY = ("pack", "length", "model")


def comparison_table(
    comparison: Comparison,
    metrics: Sequence[Metric] = METRICS,
    *,
    width: int | None = None,
    color: bool | None = None,
) -> str:
    """Metrics, checks and verdict of every candidate, as lines of at most `width` columns.

    A comparison without candidates shows the base model's metrics alone. metrics: those of the
    gate. width and color are `terminal.rendered`'s. Raises ValueError where the comparison is empty
    or does not fit together.
    """
    base = printable(comparison.base.model)
    if not comparison.candidates:
        return rendered(_base_alone(comparison, columns(metrics)), width=width, color=color) + "\n"
    summaries = summarise(comparison, metrics)
    parts: list[RenderableType] = []
    for summary in summaries:
        parts.append(Text(f"{printable(summary.label)} against {base}", style="bold"))
        parts += ["", _metrics(summary, base), "", _checks(summary), ""]
        said = (missed_sentence, worst_pack_sentence)
        sentences = (
            *plain_sentences(summary),
            *(sentence(summary) for sentence in said),
            worst_sentence(summary.rows),
            *tasks.sentences(summary),
            beside_sentence(summary),
        )
        parts += [Text(printable(sentence)) for sentence in sentences if sentence]
        parts += [_verdict(summary), ""]
    if len(summaries) > 1:
        parts.append(_leaderboard(summaries))
    return rendered(*parts, width=width, color=color) + "\n"


def _base_alone(comparison: Comparison, metrics: Sequence[Metric]) -> Table:
    made = _table(_KEY, (*(metric.label for metric in metrics), "tokens"))
    label = comparison.base.model
    reports = reports_of(comparison.base, comparison.reports)
    for key in ordered_keys(reports):
        row = Row(*key, reports[key], reports[key], None)
        numbers = [metric_numbers(metric, row.values(metric))[0] for metric in metrics]
        cells = [row.pack, str(row.seq_len), label, *numbers, f"{reports[key].scored_tokens:,}"]
        add_row(made, cells, style="bold" if row.pack == UNION else None)
    return made


def _metrics(summary: CandidateSummary, base: str) -> Table:
    other = summary.js2d_heads[1]
    labels = (*(metric.label for metric in summary.columns), JS2D.label, other, "tokens")
    made = _table(_KEY, labels)
    union = [row for row in summary.rows if row.pack == UNION]
    for row in summary.rows:
        for cells in _lines(row, base, summary):
            add_row(made, cells, style="bold" if row.pack == UNION else None)
        if union and row is union[-1]:
            made.add_section()
    return made


def _lines(row: Row, base: str, summary: CandidateSummary) -> list[list[str]]:
    """Base, candidate, delta, and its bounds."""
    numbers = [metric_numbers(metric, row.values(metric)) for metric in summary.columns]
    first, second, delta = ([n[i] for n in numbers] for i in range(3))
    divergence = [number(value, JS2D.decimals) for value in summary.js2d(row)]
    tokens = f"{row.candidate.scored_tokens:,}"
    lines = [
        [row.pack, str(row.seq_len), base, *first, "", "", tokens],
        ["", "", summary.label, *second, *divergence, ""],
        ["", "", "delta", *delta, "", "", ""],
    ]
    ends = [interval(summary, metric, row) or ("", "") for metric in (*summary.columns, JS2D)]
    for label, bound in zip(("at least", "at most"), zip(*ends, strict=True), strict=True):
        if any(bound):
            lines.append(["", "", label, *bound, "", ""])
    return lines


def _checks(summary: CandidateSummary) -> Table:
    bounds = bounds_label(summary.verdict)
    made = _table(("check", "pack", "length"), ("value", bounds, "limit", "margin", "result"))
    for check in summary.verdict.checks:
        result = Text(RESULTS[check.outcome], style=_STYLES[check.outcome])
        where = (summary.label_of(check), check.pack, str(check.seq_len or ""))
        add_row(made, [*where, *check_numbers(check), result])
    return made


def _leaderboard(summaries: tuple[CandidateSummary, ...]) -> Table:
    made = _table(("candidate",), ("verdict", "failed", "undecided", "worst delta PPL"))
    for summary in leaderboard(summaries):
        verdict = summary.verdict
        failed = f"{len(verdict.failed_checks)} of {len(verdict.checks)}"
        delta = number(summary.dppl, 3, signed=True)
        undecided = str(len(verdict.undecided_checks))
        add_row(made, [summary.label, _status(summary), failed, undecided, delta])
    return made


def _table(left: tuple[str, ...], right: tuple[str, ...]) -> Table:
    return table((*left, *right), right=right, most=24)


def _status(summary: CandidateSummary) -> Text:
    return Text(summary.verdict.status, style=f"bold {_STYLES[summary.verdict.status]}")


def _verdict(summary: CandidateSummary) -> Text:
    said = printable(verdict_sentence(summary))
    return _status(summary).append(f" {evidence(summary)}").append(f": {said}", style="none")
