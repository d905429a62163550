"""Numbers and facts as text, the same in every report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from eaft_prune.core.verdict import RECOVERY, GateCheck, GateVerdict, Status
from eaft_prune.maths.metrics import JS2D, METRICS, PPL, Metric
from eaft_prune.report.summary import CandidateSummary, Row, bounds, margin

_SHARES = {m.relative_change for m in METRICS if m.relative_limit} | {RECOVERY}  # as percent
RESULTS: Mapping[Status, str] = {"PASS": "pass", "FAIL": "FAIL", "INCONCLUSIVE": "undecided"}


def number(value: float, decimals: int, *, signed: bool = False) -> str:
    """Fixed decimals, so that columns align; large values are grouped and lose theirs."""
    size = f"{abs(value):,.0f}" if abs(value) >= 10_000 else f"{abs(value):.{decimals}f}"
    if not size.strip("0."):
        return size  # no sign on what rounds to zero
    return f"{'-' if value < 0 else '+' if signed else ''}{size}"


def metric_numbers(metric: Metric, values: tuple[float, float, float]) -> tuple[str, str, str]:
    """Base, candidate and signed delta of one metric."""
    base, candidate, delta = values
    return (
        number(base, metric.decimals),
        number(candidate, metric.decimals),
        number(delta, metric.decimals, signed=True),
    )


def check_numbers(check: GateCheck) -> tuple[str, str, str, str]:
    """The number that decides, its bounds, limit and margin; bounds are empty without an interval.

    With more decimals where four would hide on which side of the limit a number is.
    """
    ends = bounds(check) or ()
    near = [margin(check), *(check.limit - abs(end) for end in ends)]
    decimals = 4 if min(map(abs, near)) >= 5e-5 else 8
    signed = check.name != JS2D.change

    def shown(value: float, signed: bool = signed) -> str:
        if check.name in _SHARES:
            return number(100 * value, decimals - 2, signed=signed) + "%"
        return number(value, decimals, signed=signed)

    return (
        shown(check.decisive),
        " to ".join(map(shown, ends)),
        shown(check.limit, False),
        shown(margin(check), True),
    )


def plain_note(summary: CandidateSummary, check: GateCheck) -> str:
    """The plain number beside the one that decides, and why it does not; empty if they agree."""
    if check.name != JS2D.change or check.value == check.estimate:
        return ""
    value = "" if check.estimate is None else f" {number(check.value, 4)}"
    return f"plain{value}, biased upward with {summary.tokens(check):,} tokens"


def plain_sentences(summary: CandidateSummary) -> list[str]:
    """A sentence for every plain number that is not the one that decides."""
    notes = [(check, plain_note(summary, check)) for check in summary.verdict.checks]
    return [
        f"{summary.label_of(check)} on {check.pack} at {check.seq_len}: {note}"
        for check, note in notes
        if note
    ]


def interval(summary: CandidateSummary, metric: Metric, row: Row) -> tuple[str, ...]:
    """Lower and upper bound of a row's change; empty without an interval."""
    signed = metric is not JS2D
    ends = summary.bounds(metric.change, row) or ()
    return tuple(number(end, metric.decimals, signed=signed) for end in ends)


def evidence(summary: CandidateSummary) -> str:
    """What the verdict rests on, as it goes on after PASS."""
    tokens, rows = summary.evidence
    return f"on {tokens:,} tokens of {_conversations(rows)}"


def missed_sentence(summary: CandidateSummary) -> str:
    """What so few conversations may hold none of, and which checks that leaves undecided.

    A kind that befalls a share s of conversations is in none of n with chance (1 - s)^n. Empty
    without intervals.
    """
    verdict, (_, rows) = summary.verdict, summary.evidence
    if verdict.confidence is None:
        return ""
    missed = 1 - (1 - verdict.confidence) ** (1 / rows)
    within = [
        check
        for check in verdict.checks
        if check.outcome == "INCONCLUSIVE"
        and (ends := bounds(check)) is not None
        and max(map(abs, ends)) <= check.limit
    ]
    checks = "a check" if len(within) == 1 else f"{len(within)} checks"
    too_few = f": too few for {checks} whose bounds lie within the limit" if within else ""
    return (
        f"{_conversations(rows)} may hold none of what befalls {100 * missed:.2g}% of all{too_few}"
    )


def _conversations(rows: int) -> str:
    return "1 conversation" if rows == 1 else f"{rows:,} conversations"


def verdict_sentence(summary: CandidateSummary) -> str:
    """What the gate found, naming every check that failed or is not decided."""
    verdict = summary.verdict
    total = len(verdict.checks)
    failed, undecided = verdict.failed_checks, verdict.undecided_checks
    if failed:
        sentence = f"{len(failed)} of {total} checks of {verdict.gate} failed: {', '.join(failed)}"
    elif undecided:
        sentence = (
            f"{len(undecided)} of {total} checks of {verdict.gate} are undecided: "
            f"{', '.join(undecided)}; {settling(verdict)}"
        )
    else:
        sentence = f"all {total} checks of {verdict.gate} hold"
    return f"{sentence}{missing_clause(verdict)}{plain_clause(summary)}"


def missing_clause(verdict: GateVerdict) -> str:
    """Checks whose data was not gathered; empty if none."""
    return f"; not measured: {', '.join(verdict.missing)}" if verdict.missing else ""


def beside_sentence(summary: CandidateSummary) -> str:
    """What a second gate says, in a line; empty where there is none."""
    second = summary.second
    if second is None:
        return ""
    verdict = second.verdict
    counts = {
        "failed": len(verdict.failed_checks),
        "undecided": len(verdict.undecided_checks),
        "not measured": len(verdict.missing),
    }
    said = ", ".join(f"{n} {what}" for what, n in counts.items() if n)
    total = len(verdict.checks) + len(verdict.missing)
    return f"{verdict.gate} stands beside: {verdict.status}, of {total} checks {said or 'all hold'}"


def percent(share: float) -> str:
    """0.95 -> "95%"."""
    return f"{100 * share:.4g}%"


def bounds_label(verdict: GateVerdict) -> str:
    """Head of the column of bounds."""
    return "bounds" if verdict.confidence is None else f"{percent(verdict.confidence)} bounds"


def worst_pack_sentence(summary: CandidateSummary) -> str:
    """Where perplexity grew most; empty where UNION alone was evaluated."""
    row = summary.worst_pack
    if row is None:
        return ""
    change = row.candidate.ppl / row.base.ppl - 1
    ends = summary.bounds(PPL.relative_change, row)
    within = "" if ends is None else f" ({ends[0]:+.1%} to {ends[1]:+.1%})"
    return f"worst pack: {row.pack} at {row.seq_len}, PPL {change:+.1%}{within}"


def ppl_sentence(summary: CandidateSummary) -> str:
    """By how much perplexity changed where the gate looks and it changed most."""
    judged = {(check.pack, check.seq_len) for check in summary.verdict.checks}
    rows = [row for row in summary.rows if (row.pack, row.seq_len) in judged]
    row = max(rows, key=lambda row: abs(row.candidate.ppl / row.base.ppl - 1))
    base, candidate, _ = metric_numbers(PPL, row.values(PPL))
    change = row.candidate.ppl / row.base.ppl - 1
    ends = summary.bounds(PPL.relative_change, row)
    within = "" if ends is None else f" ({ends[0]:+.2%} to {ends[1]:+.2%})"
    where = f"on {row.pack} at {row.seq_len}"
    return f"PPL {change:+.2%}{within}, {base} → {candidate} {where}"


def settling(verdict: GateVerdict) -> str:
    """What would settle an inconclusive verdict."""
    check = verdict.settled_by
    if check is None:
        return "there are too few conversations to say how many would settle it"
    return f"about {check.settled_at:,} conversations would settle {check.label}"


def plain_clause(summary: CandidateSummary) -> str:
    """The confidence, and the verdict by point estimates; where it is another, on what and why."""
    verdict = summary.verdict
    if verdict.confidence is None:
        return ""
    said = f"{percent(verdict.confidence)} confidence; by point estimates {verdict.plain}"
    if verdict.plain == "FAIL" and verdict.status != "FAIL":
        reasons = [_reason(summary, check) for check in verdict.checks if not check.passed]
        said += f" on {'; on '.join(reasons)}"
    return f" ({said})"


def _reason(summary: CandidateSummary, check: GateCheck) -> str:
    """Why a check does not fail although its plain number is beyond its limit."""
    value, within, limit, _ = check_numbers(check)
    if note := plain_note(summary, check):
        decides = "" if check.estimate is None else f": the corrected {value} decides"
        return f"{check.label}, {note}{decides}"
    reaching = f", but its bounds, {within}, reach within" if within else ""
    return f"{check.label}, {value} beyond {limit}{reaching}"


def printable(text: str) -> str:
    """Without control characters, which could repaint a terminal or break a table row."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def fact_text(value: Any) -> str:
    """One fact as text: scalars as they are, lists joined, the rest as JSON."""
    if isinstance(value, Mapping):
        return json.dumps(value, default=str)
    if isinstance(value, (list, tuple)):
        return "\n".join(fact_text(item) for item in value)
    return str(value)


def fact_groups(facts: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Facts by group: plain ones under "", those of a nested mapping under its name."""
    groups: dict[str, dict[str, str]] = {"": {}}
    for name, value in facts.items():
        if isinstance(value, Mapping):
            groups[str(name)] = {str(k): fact_text(v) for k, v in value.items()}
        else:
            groups[""][str(name)] = fact_text(value)
    return {name: group for name, group in groups.items() if group}
