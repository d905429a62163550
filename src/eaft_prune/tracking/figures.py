"""How numbers are named in MLflow, whose lists are alphabetical: what people compare comes first.

summary/ is a handful a run, tables/ every pack and length, telemetry/ machinery, values/ what other
tasks found, verdict/ every check.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median

from eaft_prune.core.outcome import StageRecord
from eaft_prune.core.types import EvalKey
from eaft_prune.core.verdict import GateCheck, GateVerdict, PackReport, Reports

_PASSED = {"PASS": 1.0, "INCONCLUSIVE": 0.5, "FAIL": 0.0}
_INTERVAL = ("estimate", "low", "high", "settled_at")


def tables(
    reports: Mapping[EvalKey, PackReport], base: Mapping[EvalKey, PackReport] | None, label: str
) -> dict[str, float]:
    """One model's numbers, `tables/<pack>/<seq_len>/<metric>`, the base's under the same names.

    Of a candidate also the change of its PPL in percent. label: of a second candidate, after
    `tables/`; else empty.
    """
    found: dict[str, float] = {}
    for key, report in reports.items():
        where = f"tables/{label}{key[0]}/{key[1]}"
        found |= {f"{where}/{k}": float(v) for k, v in report.values().items() if v is not None}
        if base is not None:
            found[f"{where}/dppl_percent"] = _percent(report, base[key])
    return found


def verdict_figures(verdict: GateVerdict) -> dict[str, float]:
    """Every check, `verdict/<change>/<pack>/<seq_len>/{value,limit,estimate,low,high,...}`."""
    found: dict[str, float] = {}
    for check in verdict.checks:
        where = f"verdict/{check.name}/{check.pack}/{check.seq_len}"
        found |= {f"{where}/value": check.value, f"{where}/limit": check.limit}
        for name in _INTERVAL:
            if (known := getattr(check, name)) is not None:
                found[f"{where}/{name}"] = float(known)
    return found


def summary(verdict: GateVerdict, model: str, reports: Reports, base: str) -> dict[str, float]:
    """A verdict in few numbers: the gate's, and the PPL that grew most where it looks.

    tokens: the fewest that a check rests on. gate_pass: 1, 0.5 inconclusive, 0. gate_margin: what
    the tightest check leaves of its limit, as a share (higher = better; negative where an estimate
    is beyond it).
    """
    found = {
        "summary/gate_pass": _PASSED[verdict.status],
        "summary/gate_margin": min(map(_left, verdict.checks), default=math.nan),
    }
    judged = {(check.pack, check.seq_len) for check in verdict.checks}
    mine, theirs = reports[model], reports[base]
    there = [key for key in mine if key in judged] or list(mine)
    if there:
        worst = max(there, key=lambda key: _percent(mine[key], theirs[key]))
        found |= {
            "summary/ppl": mine[worst].ppl,
            "summary/ppl_base": theirs[worst].ppl,
            "summary/dppl_percent": _percent(mine[worst], theirs[worst]),
            "summary/tokens": float(min(mine[key].scored_tokens for key in there)),
        }
    for check in verdict.checks:
        if check.name != "dppl":
            name = f"summary/{check.name}"
            found[name] = max(found.get(name, 0.0), check.decisive, key=abs)
    return {name: value for name, value in found.items() if math.isfinite(value)}


@dataclass(frozen=True)
class Figure:
    """One number as MLflow keeps it; of a logged model too, where one is named."""

    name: str
    value: float
    step: int
    milliseconds: int  # since 1970
    model_id: str | None = None


@dataclass
class Batch:
    """What is sent in one call."""

    figures: list[Figure] = field(default_factory=list)
    params: Mapping[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)


@dataclass
class Telemetry:
    """What stages took, by the first part of their names, summed up as they end."""

    seconds: dict[str, float] = field(default_factory=dict)
    rates: dict[str, list[float]] = field(default_factory=dict)
    cached: int = 0
    stages: int = 0

    def add(self, record: StageRecord) -> dict[str, float]:
        """The numbers that this stage's end changes."""
        kind = record.stage.split("/")[0]
        self.seconds[kind] = self.seconds.get(kind, 0.0) + record.seconds
        self.cached += record.cached
        self.stages += 1
        found = {
            f"telemetry/seconds/{kind}": self.seconds[kind],
            "telemetry/stages": float(self.stages),
            "telemetry/stages_cached": float(self.cached),
        }
        if isinstance(rate := record.facts.get("tokens_per_s"), int | float):
            self.rates.setdefault(kind, []).append(rate)
            found[f"telemetry/tokens_per_s/{kind}"] = median(self.rates[kind])
        return found


def _percent(report: PackReport, base: PackReport) -> float:
    return 100 * (report.ppl / base.ppl - 1)


def _left(check: GateCheck) -> float:
    if check.limit:
        return 1 - abs(check.decisive) / check.limit
    return 0.0 if check.decisive == 0 else -math.inf


def verdict_table(verdict: GateVerdict) -> str:
    """Every check as Markdown, the status above."""
    rows = [
        f"| {check.name} | {check.pack} | {check.seq_len} | {check.decisive:+.5f} "
        f"| {_bounds(check)} | {check.limit:.5f} "
        f"| {'pass' if check.outcome == 'PASS' else f'**{check.outcome}**'} |"
        for check in verdict.checks
    ]
    failed = verdict.plain_failed_checks
    plain = f"{verdict.plain} on {', '.join(failed)}" if failed else verdict.plain
    return "\n".join(
        [
            f"**{verdict.status}** ({verdict.gate}; by point estimates {plain})",
            "",
            "| check | pack | seq_len | value | interval | limit | |",
            "|---|---|---:|---:|---:|---:|---|",
            *rows,
        ]
    )


def _bounds(check: GateCheck) -> str:
    if check.low is None or check.high is None:
        return ""
    return f"{check.low:+.5f} to {check.high:+.5f}"
