"""Numbers and facts as text, the same in every report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from eaft_prune.core.verdict import Estimate, GateCheck, GateVerdict, Status
from eaft_prune.maths.metrics import JS2D, PPL, Metric
from eaft_prune.report.summary import CandidateSummary, margin

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
    """Value, bounds, limit, margin; more decimals where four would hide on which side a number is.

    The bounds are empty where there are none.
    """
    ends = [] if check.low is None or check.high is None else [check.low, check.high]
    near = [margin(check), *(check.limit - abs(end) for end in ends)]
    decimals = 4 if min(map(abs, near)) >= 5e-5 else 8
    signed = check.name != JS2D.change
    return (
        number(check.value, decimals, signed=signed),
        " to ".join(number(end, decimals, signed=signed) for end in ends),
        number(check.limit, decimals),
        number(margin(check), decimals, signed=True),
    )


def reach(estimate: Estimate | None, decimals: int) -> str:
    """How far the bounds are from the value, "±0.010"; empty without an interval."""
    return "" if estimate is None else f"±{number(estimate.reach, decimals)}"


def verdict_sentence(verdict: GateVerdict) -> str:
    """What the gate found, naming every check that failed or is not decided."""
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
    return f"{sentence}{plain_clause(verdict)}"


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
    interval = row.estimate(PPL.relative_change)
    bounds = "" if interval is None else f" ({interval.low:+.1%} to {interval.high:+.1%})"
    return f"worst pack: {row.pack} at {row.seq_len}, PPL {change:+.1%}{bounds}"


def agreement_sentence(summary: CandidateSummary) -> str:
    """KL to the base and top-1 agreement by row; empty where the likeliest tokens were not kept."""
    said = [
        f"{row.pack} at {row.seq_len} KL {row.candidate.kl_top:.4f}, "
        f"top-1 {row.candidate.top1_agreement:.2%}"
        for row in summary.rows
        if row.candidate.kl_top is not None
    ]
    return "likeliest tokens against the base's: " + "; ".join(said) if said else ""


def settling(verdict: GateVerdict) -> str:
    """What would settle an inconclusive verdict."""
    check = verdict.settled_by
    if check is None:
        return "there are too few conversations to say how many would settle it"
    return f"about {check.settled_at:,} conversations would settle {check.label}"


def plain_clause(verdict: GateVerdict) -> str:
    """The confidence, and the verdict by point estimates where intervals decided."""
    if verdict.confidence is None:
        return ""
    failed = verdict.plain_failed_checks
    named = f" on {', '.join(failed)}" if failed and verdict.status != "FAIL" else ""
    return f" ({percent(verdict.confidence)} confidence; by point estimates {verdict.plain}{named})"


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
