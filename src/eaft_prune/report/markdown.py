"""The comparison as Markdown, for pull requests."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from eaft_prune.core.outcome import Selection
from eaft_prune.core.text import id_ranges
from eaft_prune.core.types import UNION
from eaft_prune.core.verdict import Comparison
from eaft_prune.maths.metrics import JS2D, METRICS, Metric
from eaft_prune.report import divergence, tasks
from eaft_prune.report.experts import expert_map, method, selections_of
from eaft_prune.report.gains import Gain, gains_lines
from eaft_prune.report.summary import (
    CORRECTED_MEANING,
    PLAIN_MEANING,
    CandidateSummary,
    Row,
    leaderboard,
    summarise,
)
from eaft_prune.report.text import (
    RESULTS,
    beside_sentence,
    bounds_label,
    check_numbers,
    evidence,
    fact_groups,
    interval,
    metric_numbers,
    missed_sentence,
    number,
    plain_sentences,
    ppl_sentence,
    printable,
    verdict_sentence,
    worst_pack_sentence,
)


def markdown_report(
    comparison: Comparison,
    selection: Selection | Mapping[str, Selection] | None,
    facts: Mapping[str, Any],
    *,
    about: Mapping[str, str] = {},
    gains: Sequence[Gain] = (),
    metrics: Sequence[Metric] = METRICS,
) -> str:
    """Verdict, checks, metrics, experts that went and provenance of every candidate.

    selection: of all candidates, or by candidate label. facts: provenance; values of nested
    mappings are grouped. about: what was run. gains: what pruning buys. metrics:
    those of the gate. Raises ValueError where the inputs are empty or do not fit together.
    """
    summaries = leaderboard(summarise(comparison, metrics))
    selections = selections_of(comparison, selection)
    lines = gains_lines(gains) + (_leaderboard(summaries) if len(summaries) > 1 else [])
    for summary in summaries:
        lines += _candidate(summary, comparison.base.model)
    if about:
        known = [(inline(label), code(fact)) for label, fact in about.items()]
        lines += ["## What was run", "", *table(("", ""), known, left=2)]
    for label, one in selections.items():
        if isinstance(selection, Selection):
            lines += _experts("Experts", one)
            break
        lines += _experts(f"Experts of {inline(label)}", one)
    lines += _provenance(facts)
    return "\n".join(lines).rstrip() + "\n"


def verdict_section(comparison: Comparison, label: str, metrics: Sequence[Metric]) -> str:
    """The verdict on one candidate and its checks, without a heading."""
    (summary,) = (s for s in summarise(comparison, metrics) if s.label == label)
    status = f"**{summary.verdict.status}** {evidence(summary)}"
    said = [f"{status}: {inline(verdict_sentence(summary))}.", ""]
    sentences = (missed_sentence, ppl_sentence, worst_pack_sentence)
    further = _sentences(sentence(summary) for sentence in sentences)
    return "\n".join([*said, *further, *_checks(summary)])


def _leaderboard(summaries: Sequence[CandidateSummary]) -> list[str]:
    passed = sum(summary.passed for summary in summaries)
    rows = [
        (
            inline(s.label),
            f"**{s.verdict.status}**",
            f"{len(s.verdict.failed_checks)} of {len(s.verdict.checks)}",
            str(len(s.verdict.undecided_checks)),
            number(s.dppl, 3, signed=True),
        )
        for s in summaries
    ]
    return [
        f"## {passed} of {len(summaries)} candidates pass {evidence(summaries[0])}",
        "",
        *table(("candidate", "verdict", "failed checks", "undecided", "worst Δ PPL"), rows, left=2),
    ]


def _checks(summary: CandidateSummary) -> list[str]:
    """The gate's table, and what is said of plain numbers."""
    rows = [
        (
            summary.label_of(check),
            inline(check.pack),
            str(check.seq_len or ""),
            *check_numbers(check),
            "pass" if check.outcome == "PASS" else f"**{RESULTS[check.outcome]}**",
        )
        for check in summary.verdict.checks
    ]
    rows += [
        (code(label), "", "", "", "", "", "", "not measured") for label in summary.verdict.missing
    ]
    columns = (bounds_label(summary.verdict), "limit", "margin", "result")
    checks = table(("check", "pack", "length", "value", *columns), rows, left=2)
    return [*checks, *_sentences(plain_sentences(summary))]


def _candidate(summary: CandidateSummary, base: str) -> list[str]:
    sentences = (missed_sentence, ppl_sentence, worst_pack_sentence)
    further = [sentence(summary) for sentence in sentences]
    note = "" if summary.verdict.confidence is None else ", changes with their bounds"
    labels = [label for metric in summary.columns for label in (metric.label, "Δ")]
    header = ("pack", "length", *labels, JS2D.label, summary.js2d_heads[1], "tokens")
    return [
        f"## {summary.verdict.status} {evidence(summary)}: {inline(summary.label)} against "
        f"{inline(base)}",
        "",
        f"{inline(verdict_sentence(summary))}.",
        "",
        *_sentences(further),
        *_checks(summary),
        *_beside(summary),
        f"Metrics are written base → candidate{note}.",
        "",
        *table(header, [_metric_cells(summary, row) for row in summary.rows], left=1),
        *_divergence(summary),
        *_tasks(summary),
        "<details><summary>What the metrics mean</summary>",
        "",
        *(f"- **{metric.label}**: {metric.sentence}" for metric in (*summary.columns, JS2D)),
        f"- **corrected**: {CORRECTED_MEANING}",
        f"- **plain**: {PLAIN_MEANING}",
        "",
        "</details>",
        "",
    ]


def _beside(summary: CandidateSummary) -> list[str]:
    second = summary.second
    if second is None:
        return []
    head = f"<details><summary>{html.escape(beside_sentence(summary))}</summary>"
    return [head, "", *_checks(second), "</details>", ""]


def _divergence(summary: CandidateSummary) -> list[str]:
    header = (*divergence.HEADS, *divergence.heads())
    rows = []
    for row, cells in divergence.lines(summary):
        shown = [f"{value} ({ends})" if ends else value for value, ends in cells]
        rows.append([inline(row.pack), str(row.seq_len), *shown])
    note = divergence.NOTE if any(map(divergence.measured, summary.rows)) else divergence.MISSING
    return [
        "### Divergence from the base",
        "",
        *table(tuple(map(inline, header)), rows, left=1),
        f"{note}.",
        "",
    ]


def _tasks(summary: CandidateSummary) -> list[str]:
    if not summary.tasks:
        return []
    rows = [
        (
            inline(task),
            inline(metric),
            *(f"{value} ({ends})" if ends else value for value, ends in cells),
        )
        for task, metric, cells in tasks.lines(summary)
    ]
    heads = tuple(map(inline, (*tasks.HEADS, *tasks.COLUMNS)))
    said = _sentences([tasks.NOTE, tasks.left_out(summary.tasks)])
    return ["### Tasks", "", *table(heads, rows, left=2), *said]


def _sentences(said: Iterable[str]) -> list[str]:
    return [
        line for text in map(inline, said) if text for line in (f"{text[0].upper()}{text[1:]}.", "")
    ]


def _metric_cells(summary: CandidateSummary, row: Row) -> list[str]:
    cells = [inline(row.pack), str(row.seq_len)]
    for metric in summary.columns:
        base, candidate, delta = metric_numbers(metric, row.values(metric))
        cells += [f"{base} → {candidate}", _with_bounds(delta, interval(summary, metric, row))]
    decides, other = (number(value, JS2D.decimals) for value in summary.js2d(row))
    cells += [_with_bounds(decides, interval(summary, JS2D, row)), other]
    cells.append(f"{row.candidate.scored_tokens:,}")
    return [f"**{cell}**" for cell in cells] if row.pack == UNION else cells


def _with_bounds(value: str, ends: tuple[str, ...]) -> str:
    return f"{value} ({' to '.join(ends)})" if ends else value


def _experts(title: str, selection: Selection) -> list[str]:
    experts = expert_map(selection)
    n_layers, n_experts = experts.kept_LE.shape
    keep_n = selection.plan.uniform_keep_n
    kept = (
        f"{keep_n} of" if keep_n else f"{int(experts.kept_LE.sum()) / n_layers:.1f} on average of"
    )
    rows = []
    for layer in range(n_layers):
        dropped = (~experts.kept_LE[layer]).nonzero()[0].tolist()
        tied = experts.tied_LE[layer].nonzero()[0].tolist()
        rows.append((str(layer), id_ranges(dropped) or "none", id_ranges(tied) or "none"))
    return [
        f"## {title}",
        "",
        f"Criterion {inline(method(selection))} keeps {kept} {n_experts} experts in each of "
        f"{n_layers} layers. The tie zone holds the experts, kept or dropped, whose score lies "
        "within 2% of the layer's spread of the cut.",
        "",
        "<details><summary>Dropped experts per layer</summary>",
        "",
        *table(("layer", "dropped", "tie zone"), rows, left=0),
        "</details>",
        "",
    ]


def _provenance(facts: Mapping[str, Any]) -> list[str]:
    lines = ["## Provenance", ""] if facts else []
    for group, items in fact_groups(facts).items():
        fold = f"<details><summary>{html.escape(printable(group))}</summary>"
        lines += [fold, ""] if group else []
        lines += table(("fact", "value"), [(inline(k), code(v)) for k, v in items.items()], left=2)
        lines += ["</details>", ""] if group else []
    return lines


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, left: int) -> list[str]:
    """Pipe table: the first `left` columns aligned left, the others right."""
    rule = [":--" if i < left else "--:" for i in range(len(header))]
    return [*(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows)), ""]


def inline(text: str) -> str:
    """Text that Markdown and HTML leave as it is, also inside a table."""
    return re.sub(r"([\\`*_\[\]<>|~#&!])", r"\\\1", printable(text))


def code(text: str) -> str:
    """Code spans, one per line of the value; a span longer than any run of backticks inside."""
    spans = []
    for line in text.splitlines() or [""]:
        body = printable(line).replace("|", "\\|")
        fence = "`" * (1 + max((len(run) for run in re.findall("`+", body)), default=0))
        pad = " " if body.startswith("`") or body.endswith("`") else ""
        spans.append(f"{fence}{pad}{body}{pad}{fence}" if body else "")
    return "<br>".join(spans)
