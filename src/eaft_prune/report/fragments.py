"""Pieces of the HTML report: tables and the verdict; what comes from outside is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from eaft_prune.core.types import UNION
from eaft_prune.core.verdict import GateCheck, Status
from eaft_prune.maths.metrics import JS2D, Metric
from eaft_prune.report.elements import numeral, scroll, small, status, text
from eaft_prune.report.summary import (
    CORRECTED_MEANING,
    PLAIN_MEANING,
    TOKENS_MEANING,
    CandidateSummary,
    Row,
    bounds,
    columns,
    leaderboard,
    share,
    usage,
)
from eaft_prune.report.text import (
    beside_sentence,
    bounds_label,
    check_numbers,
    evidence,
    fact_groups,
    interval,
    metric_numbers,
    missed_sentence,
    missing_clause,
    number,
    plain_clause,
    plain_note,
    ppl_sentence,
    printable,
    settling,
    worst_pack_sentence,
)

NEAR = 0.75  # share of a limit from which a delta is shown as near it
OPEN_FACTS = 6  # groups of more facts start folded
BAR_FULL = 1.5  # share of a limit at which a bar is full
_SENTENCES: Mapping[Status, str] = {"FAIL": "failed", "INCONCLUSIVE": "are undecided"}


def headline(summaries: Sequence[CandidateSummary], base: str) -> str:
    """How many of several candidates pass; one candidate has its verdict instead."""
    if len(summaries) == 1:
        return ""
    passed = sum(summary.passed for summary in summaries)
    unsure = sum(summary.verdict.status == "INCONCLUSIVE" for summary in summaries)
    state = "pass" if passed else "inconclusive" if unsure else "fail"
    rest = f"; {unsure} more {'is' if unsure == 1 else 'are'} not decided" if unsure else ""
    return (
        f'<p class="tally"><strong class="{state}">{passed} of {len(summaries)}</strong> '
        f"candidates pass the gate against {text(base)} {evidence(summaries[0])}{rest}.</p>"
    )


def leaderboard_table(summaries: Sequence[CandidateSummary]) -> str:
    """Candidates, best first, each with a button that selects it."""
    labels = {check.name: s.label_of(check) for s in summaries for check in s.verdict.checks}
    rows = []
    for place, summary in enumerate(leaderboard(tuple(summaries)), start=1):
        failed = f"{len(summary.verdict.failed_checks)} of {len(summary.verdict.checks)}"
        cells = [
            f'<td class="place">{place}</td>',
            f'<th scope="row"><button type="button" class="pick" data-pick="{text(summary.label)}">'
            f"{text(summary.label)}</button></th>",
            f"<td>{status(summary.verdict.status)}</td>",
            f'<td class="n">{failed}</td>',
            f'<td class="n">{len(summary.verdict.undecided_checks)}</td>',
            *(_worst_cell(summary.worst(name)) for name in labels),
        ]
        rows.append(f'<tr data-row="{text(summary.label)}">{"".join(cells)}</tr>')
    head = '<th scope="col"></th><th scope="col">candidate</th><th scope="col">verdict</th>'
    for label in ("failed", "undecided", *labels.values()):
        head += f'<th scope="col" class="n">{text(label)}</th>'
    return scroll("Leaderboard", f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>")


def _worst_cell(check: GateCheck | None) -> str:
    if check is None:
        return '<td class="n">none</td>'
    return f'<td class="n {_tone(usage(check))}">{numeral(check_numbers(check)[0])}</td>'


def verdict_block(summary: CandidateSummary, base: str) -> str:
    """The verdict, what decides it, the plain one beside it, and a bar for each check."""
    verdict = summary.verdict
    sides = {outcome: [c for c in verdict.checks if c.outcome == outcome] for outcome in _SENTENCES}
    sentence = f"All {len(verdict.checks)} checks of {text(verdict.gate)} hold"
    for outcome, verb in _SENTENCES.items():
        if named := sides[outcome]:
            share = f"{len(named)} of {len(verdict.checks)}"
            sentence = f"{share} checks of {text(verdict.gate)} {verb}: {_names(summary, named)}"
            break
    if verdict.undecided_checks and not verdict.failed_checks:
        settled = settling(verdict)
        sentence += f". {text(settled[0].upper() + settled[1:])}"
    sentence += f"{text(missing_clause(verdict))}{text(numeral(plain_clause(summary)))}."
    sentences = (missed_sentence, ppl_sentence, worst_pack_sentence)
    said = [numeral(sentence(summary)) for sentence in sentences]
    further = "".join(f"<p>{text(part[0].upper() + part[1:])}.</p>" for part in said if part)
    return (
        f'<div class="verdict"><p class="word">{status(verdict.status)} '
        f"{text(evidence(summary))}</p>"
        f'<p class="pair">{text(summary.label)} <span>against</span> {text(base)}</p>'
        f"<p>{sentence}</p>{further}</div>"
        f"{_checks_table(summary)}{beside_block(summary)}"
    )


def _names(summary: CandidateSummary, checks: Iterable[GateCheck]) -> str:
    lengths: dict[tuple[str, str], list[str]] = {}
    for check in checks:
        at = lengths.setdefault((summary.label_of(check), printable(check.pack)), [])
        at += [str(check.seq_len)] if check.seq_len else []
    return ", ".join(
        f"<b>{text(label)}</b> on {text(pack)}{' at ' if at else ''}{' and '.join(at)}"
        for (label, pack), at in lengths.items()
    )


def _whisker(check: GateCheck) -> str:
    """The interval on the bar, as shares of the limit."""
    ends = bounds(check)
    if ends is None or check.limit == 0:
        return ""
    low, high = sorted(map(abs, ends))
    sizes = (0.0 if ends[0] <= 0 <= ends[1] else low, high)
    left, right = (min(share(size, check.limit), BAR_FULL) / BAR_FULL * 100 for size in sizes)
    return f'<b style="left:{left:.1f}%;width:{max(right - left, 0.3):.1f}%"></b>'


def _where(check: GateCheck) -> str:
    place = printable(check.pack)
    return f"{place} · {check.seq_len}" if check.seq_len else place


def _checks_table(summary: CandidateSummary) -> str:
    verdict = summary.verdict
    head = "".join(
        f'<th scope="col"{css}>{label}</th>'
        for label, css in (
            ("check", ""), ("share of its limit", ""), ("value", ' class="n"'),
            (bounds_label(verdict), ' class="n"'), ("limit", ' class="n"'),
            ("margin", ' class="n"'), ("result", ""),
        )
    )  # fmt: skip
    rows = []
    for check in verdict.checks:
        value, within, limit, margin = (numeral(n) for n in check_numbers(check))
        used = usage(check)
        width = min(used, BAR_FULL) / BAR_FULL * 100
        taken = f"{used:.0%}" if used < 100 else "over 100 times"
        note = small(numeral(plain_note(summary, check)))
        rows.append(
            f'<tr class="{_tone(used)}"><th scope="row">{text(summary.label_of(check))} '
            f"<small>{text(_where(check))}</small></th>"
            f'<td class="bar"><span class="track" role="img" aria-label="{taken} of the limit">'
            f'<i style="width:{width:.1f}%"></i>{_whisker(check)}</span>{note}</td>'
            f'<td class="n">{value}</td><td class="n">{within}</td><td class="n">{limit}</td>'
            f'<td class="n">{margin}</td><td>{status(check.outcome)}</td></tr>'
        )
    for label in verdict.missing:
        rows.append(
            f'<tr><th scope="row">{text(label)}</th><td></td><td></td><td></td><td></td><td></td>'
            f"<td>{status('NOT MEASURED')}</td></tr>"
        )
    table = f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f'<table class="checks">{table}</table>'


def beside_block(summary: CandidateSummary) -> str:
    """A second gate's verdict, folded; empty where there is none."""
    second = summary.second
    if second is None:
        return ""
    return (
        f'<details class="beside"><summary>{status(second.verdict.status)} '
        f"{text(beside_sentence(summary))}</summary>{_checks_table(second)}</details>"
    )


def metrics_table(summary: CandidateSummary, base: str) -> str:
    """Every pack and length: base, candidate and delta of each metric, then divergence."""
    top = '<th scope="col" rowspan="2">pack</th><th scope="col" rowspan="2" class="n">length</th>'
    sub = ""
    for metric in summary.columns:
        top += f'<th scope="colgroup" colspan="3" class="group">{text(metric.label)}</th>'
        sub += f'<th scope="col" class="n group">{text(base)}</th>'
        sub += (
            f'<th scope="col" class="n">{text(summary.label)}</th><th scope="col" class="n">Δ</th>'
        )
    decides, other = summary.js2d_heads
    top += '<th scope="colgroup" colspan="2" class="group">JS2D</th>'
    sub += f'<th scope="col" class="n group">{decides}</th><th scope="col" class="n">{other}</th>'
    top += '<th scope="col" rowspan="2" class="n group">tokens</th>'
    body = "".join(_metrics_row(summary, row) for row in summary.rows)
    head = f"<thead><tr>{top}</tr><tr>{sub}</tr></thead>"
    return scroll(f"Metrics of {summary.label}", f"{head}<tbody>{body}</tbody>")


def _metrics_row(summary: CandidateSummary, row: Row) -> str:
    cells = ""
    for metric in summary.columns:
        values = row.values(metric)
        base, candidate, delta = (numeral(n) for n in metric_numbers(metric, values))
        tone, ends = _tone(summary.used(metric, row)), _interval(summary, metric, row)
        cells += f'<td class="n group">{base}</td><td class="n">{candidate}</td>'
        cells += f'<td class="n delta {tone}">{delta}{ends}</td>'
    decides, other = (numeral(number(value, JS2D.decimals)) for value in summary.js2d(row))
    tone, ends = _tone(summary.used(JS2D, row)), _interval(summary, JS2D, row)
    cells += f'<td class="n group delta {tone}">{decides}{ends}</td>'
    cells += f'<td class="n other">{other}</td>'
    cells += f'<td class="n group">{row.candidate.scored_tokens:,}</td>'
    emphasis = ' class="union"' if row.pack == UNION else ""
    name = f'<th scope="row">{text(row.pack)}</th><td class="n">{row.seq_len}</td>'
    return f"<tr{emphasis}>{name}{cells}</tr>"


def _interval(summary: CandidateSummary, metric: Metric, row: Row) -> str:
    ends = "\N{NO-BREAK SPACE}to ".join(interval(summary, metric, row))  # two lines, not three
    return small(numeral(ends))


def glossary(metrics: Sequence[Metric]) -> str:
    """One sentence for each metric."""
    entries = [(metric.label, metric.sentence) for metric in (*columns(metrics), JS2D)]
    entries += [
        ("corrected", CORRECTED_MEANING),
        ("plain", PLAIN_MEANING),
        ("tokens", TOKENS_MEANING),
    ]
    items = "".join(f"<div><dt>{text(a)}</dt><dd>{text(b)}</dd></div>" for a, b in entries)
    return f'<dl class="glossary">{items}</dl>'


def fact_list(facts: Mapping[str, str], kind: str) -> str:
    """Facts by name, as they are looked at with a class of the style sheet."""
    pairs = "".join(
        f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in facts.items()
    )
    return f'<dl class="{kind}">{pairs}</dl>' if facts else ""


def provenance(facts: Mapping[str, Any]) -> str:
    """The facts, nested mappings under their own heading."""
    parts = []
    for group, items in fact_groups(facts).items():
        listed = fact_list(items, "facts")
        state = " open" if len(items) <= OPEN_FACTS else ""
        summary = f"<summary>{text(printable(group))}</summary>"
        parts.append(f"<details{state}>{summary}{listed}</details>" if group else listed)
    return "".join(parts) or "<p>No facts were recorded.</p>"


def _tone(used: float | None) -> str:
    if used is None:
        return ""
    return "over" if used > 1 else "near" if used > NEAR else "within"
