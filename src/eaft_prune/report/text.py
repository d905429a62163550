"""Numbers and facts as text, the same in every report."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from eaft_prune.report.summary import Metric, margin
from eaft_prune.types import GateCheck, GateVerdict


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


def check_numbers(check: GateCheck) -> tuple[str, str, str]:
    """Value, limit and margin; more decimals where four would hide on which side the value is."""
    decimals = 4 if abs(margin(check)) >= 5e-5 else 8
    signed = check.name != "js2d"
    return (
        number(check.value, decimals, signed=signed),
        number(check.limit, decimals),
        number(margin(check), decimals, signed=True),
    )


def verdict_sentence(verdict: GateVerdict) -> str:
    """What the gate found, naming every failed check."""
    total = len(verdict.checks)
    failed = verdict.failed_checks
    if failed:
        return f"{len(failed)} of {total} checks of {verdict.gate} failed: {', '.join(failed)}"
    return f"all {total} checks of {verdict.gate} hold"


def printable(text: str) -> str:
    """Without control characters, which could repaint a terminal or break a table row."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def id_ranges(ids: Iterable[int]) -> str:
    """0, 1, 2, 7 -> "0-2, 7"; ids ascend."""
    runs: list[list[int]] = []
    for i in ids:
        if runs and i == runs[-1][1] + 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


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
