"""What every report shows of a Comparison, checked once and put in reading order."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from eaft_prune.core.harness import TaskReport
from eaft_prune.core.types import UNION, EvalKey, Evaluation
from eaft_prune.core.verdict import (
    RECOVERY,
    Changes,
    Comparison,
    Estimate,
    GateCheck,
    GateVerdict,
    PackReport,
    Reports,
)
from eaft_prune.maths.metrics import JS2D, METRICS, PPL, Metric

CORRECTED_MEANING = (
    "JS2D without the bias of small samples, from pairs of different conversations; about 0 it may "
    "be negative. Its interval decides the JS2D check."
)
PLAIN_MEANING = (
    "JS2D of the two histograms as they are. Chance alone sets them apart, so it is biased upward, "
    "the more the fewer tokens."
)
TOKENS_MEANING = "Assistant tokens that were scored, the same ones for both models."


@dataclass(frozen=True)
class Row:
    """Base and candidate on one pack at one sequence length."""

    pack: str
    seq_len: int
    base: PackReport
    candidate: PackReport
    changes: Changes | None  # None: too few rows, or no intervals were asked for

    def values(self, metric: Metric) -> tuple[float, float, float]:
        """(base, candidate, candidate - base)."""
        base, candidate = self.base[metric.name], self.candidate[metric.name]
        return base, candidate, candidate - base

    def estimate(self, name: str) -> Estimate | None:
        """What is known of a change, by the gate's name for it."""
        return None if self.changes is None else self.changes.get(name)


@dataclass(frozen=True)
class CandidateSummary:
    """One candidate against the base model."""

    label: str
    verdict: GateVerdict
    rows: tuple[Row, ...]
    metrics: tuple[Metric, ...]  # of the comparison, in the order of METRICS
    beside: GateVerdict | None = None  # of a second gate, which decides nothing
    tasks: Mapping[str, TaskReport] = field(default_factory=dict)

    @property
    def second(self) -> CandidateSummary | None:
        """The same with the second gate's verdict, if there is one."""
        return None if self.beside is None else replace(self, verdict=self.beside, beside=None)

    @property
    def columns(self) -> tuple[Metric, ...]:
        """The metrics that base and candidate each have a number of, as reports show them."""
        return columns(self.metrics)

    def label_of(self, check: GateCheck) -> str:
        """What people call a check."""
        labels = {metric.change: metric.change_label for metric in self.metrics}
        labels |= {m.relative_change: f"{m.change_label} / {m.label}" for m in self.metrics}
        labels[RECOVERY] = "Δ recovery"
        return labels.get(check.name, check.name)

    def settled_by(self, name: str, place: str) -> str:
        """How many would decide an undecided check of what is written or answered; or nothing."""
        second = () if self.beside is None else self.beside.checks
        for check in (*self.verdict.checks, *second):
            if (check.name, check.pack) == (name, place) and check.settled_at is not None:
                return f"{check.settled_at:,}"
        return ""

    @property
    def passed(self) -> bool:
        return self.verdict.status == "PASS"

    @property
    def dppl(self) -> float:
        """The delta of PPL that is largest in size among the gate's, else among all rows."""
        gated = [check.value for check in self.verdict.checks if check.name == PPL.change]
        return max(gated or [row.values(PPL)[2] for row in self.rows], key=abs)

    @property
    def worst_pack(self) -> Row | None:
        """Where perplexity grew most, relative to the base; UNION is no pack."""
        packs = [row for row in self.rows if row.pack != UNION]
        return max(packs, key=lambda row: row.candidate.ppl / row.base.ppl, default=None)

    def worst(self, name: str) -> GateCheck | None:
        """The check of this name that uses most of its limit."""
        checks = [check for check in self.verdict.checks if check.name == name]
        return max(checks, key=usage, default=None)

    def bounds(self, name: str, row: Row) -> tuple[float, float] | None:
        """Lower and upper bound of a change: those that its check was decided by, if it has one."""
        for check in self.verdict.checks:
            if (check.name, check.pack, check.seq_len) == (name, row.pack, row.seq_len):
                return bounds(check)
        estimate = row.estimate(name)
        return None if estimate is None else (estimate.low, estimate.high)

    def tokens(self, check: GateCheck) -> int:
        """Scored tokens that a check rests on."""
        (row,) = (r for r in self.rows if (r.pack, r.seq_len) == (check.pack, check.seq_len))
        return row.candidate.scored_tokens

    @property
    def evidence(self) -> tuple[int, int]:
        """Fewest scored tokens and conversations that a check rests on."""
        judged = {(check.pack, check.seq_len) for check in self.verdict.checks}
        reports = [r.candidate for r in self.rows if (r.pack, r.seq_len) in judged]
        return min(r.scored_tokens for r in reports), min(r.rows for r in reports)

    @property
    def js2d_heads(self) -> tuple[str, str]:
        """What `js2d` gives: first the one that decides."""
        decides, other = "corrected", "plain"
        return (other, decides) if self.verdict.confidence is None else (decides, other)

    def js2d(self, row: Row) -> tuple[float, float]:
        """JS2D of this row: the one that decides, then the other."""
        found = {"plain": row.candidate.js2d, "corrected": row.candidate.js2d_corrected}
        decides, other = self.js2d_heads
        return found[decides], found[other]

    def used(self, metric: Metric, row: Row) -> float | None:
        """Largest share of a limit that this row's change takes; None where there is no limit."""
        base, _, delta = row.values(metric)
        if metric is JS2D:
            delta = self.js2d(row)[0]
        changes = {metric.change: delta}
        if metric.relative_limit is not None:
            changes[metric.relative_change] = delta / base
        limits = ((value, self.limit(name, row)) for name, value in changes.items())
        shares = [share(value, limit) for value, limit in limits if limit is not None]
        return max(shares, default=None)

    def limit(self, name: str, row: Row) -> float | None:
        """The gate's limit for this row: its own, else of the same length, else the strictest."""
        checks = [check for check in self.verdict.checks if check.name == name]
        near = [check for check in checks if check.seq_len == row.seq_len]
        own = [check for check in near if check.pack == row.pack]
        return min((check.limit for check in own or near or checks), default=None)


def bounds(check: GateCheck) -> tuple[float, float] | None:
    """What a check was decided by, if an interval was made."""
    return None if check.low is None or check.high is None else (check.low, check.high)


def usage(check: GateCheck) -> float:
    """Share of its limit that a check's number takes."""
    return share(check.decisive, check.limit)


def share(value: float, limit: float) -> float:
    """|value| / limit; of a limit of 0 nothing or infinitely much."""
    if limit > 0:
        return abs(value) / limit
    return 0.0 if value == 0 else math.inf


def margin(check: GateCheck) -> float:
    """What a check's number leaves of its limit, negative where it is exceeded."""
    return check.limit - abs(check.decisive)


def columns(metrics: Sequence[Metric]) -> tuple[Metric, ...]:
    """Those that reports show, but for JS2D, which has columns of its own."""
    return tuple(m for m in metrics if m.label and m.place == "columns" and m is not JS2D)


def ordered_keys(keys: Iterable[EvalKey]) -> list[EvalKey]:
    """UNION first, then packs in their own order; lengths ascend within a pack."""
    given = list(keys)
    packs = list(dict.fromkeys([UNION, *(pack for pack, _ in given)]))
    return sorted(given, key=lambda key: (packs.index(key[0]), key[1]))


def summarise(
    comparison: Comparison, metrics: Sequence[Metric] = METRICS
) -> tuple[CandidateSummary, ...]:
    """Every candidate, in the order of the comparison.

    Raises ValueError where there is nothing to report, or where evaluations, reports and verdicts
    do not belong together.
    """
    if not comparison.candidates:
        raise ValueError("the comparison has no candidate to report on")
    labels = [comparison.base.model, *(candidate.model for candidate in comparison.candidates)]
    twice = {label for label in labels if labels.count(label) > 1}
    if twice:
        raise ValueError(f"models of a comparison need different labels; twice: {sorted(twice)}")
    base = reports_of(comparison.base, comparison.reports)
    return tuple(
        _summary(candidate, base, comparison, tuple(metrics)) for candidate in comparison.candidates
    )


def leaderboard(summaries: tuple[CandidateSummary, ...]) -> list[CandidateSummary]:
    """Best first: PASS, INCONCLUSIVE, FAIL; fewer failed checks; smaller |dPPL|."""
    order = ("PASS", "INCONCLUSIVE", "FAIL")
    return sorted(
        summaries,
        key=lambda s: (
            order.index(s.verdict.status),
            len(s.verdict.failed_checks),
            len(s.verdict.undecided_checks),
            abs(s.dppl),
        ),
    )


def _summary(
    candidate: Evaluation,
    base: Mapping[EvalKey, PackReport],
    comparison: Comparison,
    metrics: tuple[Metric, ...],
) -> CandidateSummary:
    label = candidate.model
    reports = reports_of(candidate, comparison.reports)
    if set(reports) != set(base):
        raise ValueError(
            f"{label!r} was evaluated on {ordered_keys(reports)}, "
            f"the base {comparison.base.model!r} on {ordered_keys(base)}"
        )
    for key in base:
        if reports[key].scored_tokens != base[key].scored_tokens:
            raise ValueError(
                f"{label!r} scored {reports[key].scored_tokens} tokens of {key}, "
                f"the base {base[key].scored_tokens}: not the same blocks"
            )
    changes = comparison.changes.get(label, {})
    rows = tuple(Row(*key, base[key], reports[key], changes.get(key)) for key in ordered_keys(base))
    verdict, beside = _verdict_of(label, comparison.verdicts), comparison.beside.get(label)
    tasks = comparison.tasks.get(label, {})
    return CandidateSummary(label, verdict, rows, metrics, beside, tasks)


def reports_of(evaluation: Evaluation, reports: Reports) -> Mapping[EvalKey, PackReport]:
    """The reports of one model; ValueError where there are none, or one is empty or NaN."""
    label = evaluation.model
    if not reports.get(label):
        raise ValueError(f"the comparison has no reports of {label!r}; it has {sorted(reports)}")
    for key, report in reports[label].items():
        if report.scored_tokens <= 0:
            raise ValueError(f"the report of {label!r} on {key} has no scored tokens")
        if any(value is not None and math.isnan(value) for value in report.values().values()):
            raise ValueError(f"the report of {label!r} on {key} holds NaN: {report}")
    return reports[label]


def _verdict_of(label: str, verdicts: Mapping[str, GateVerdict]) -> GateVerdict:
    if label not in verdicts:
        raise ValueError(f"there is no verdict on {label!r}; the gate judged {sorted(verdicts)}")
    verdict = verdicts[label]
    if not verdict.checks:
        raise ValueError(f"the verdict on {label!r} has no checks")
    if any(math.isnan(check.value) or math.isnan(check.limit) for check in verdict.checks):
        raise ValueError(f"the verdict on {label!r} holds NaN: {verdict}")
    if verdict.status == "PASS" and verdict.failed_checks:
        raise ValueError(f"the verdict on {label!r} is PASS, yet {verdict.failed_checks} failed")
    return verdict
