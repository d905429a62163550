"""Reports -> verdict: near-lossless or not, or not known yet, and which inequality decides."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from eaft_prune.config import GateSettings
from eaft_prune.core.types import EvalKey, UserError
from eaft_prune.core.verdict import (
    GENERATED,
    RECOVERY,
    TASKS,
    Changes,
    Estimate,
    GateCheck,
    GateVerdict,
    PackReport,
    Status,
)
from eaft_prune.maths.intervals import bounds, least_rows

_MOST_ROWS = 100_000_000  # more than these would not settle anything for anyone


def gate(
    settings: GateSettings,
    base: Mapping[EvalKey, PackReport],
    candidate: Mapping[EvalKey, PackReport],
    changes: Mapping[EvalKey, Changes] | None = None,
    generated: Sequence[Changes] = (),
    tasks: Mapping[str, Changes] = {},
) -> GateVerdict:
    """Every |candidate - base| within its limit, on the gate's packs at each length.

    |dPPL| <= max_dppl and <= max_dppl_relative * PPL_base; |dCC| <= max_dcc_rate;
    |d mean p| <= max_dmean_prob; JS2D <= max_js2d; the change of a metric of `gate.metrics` <= its
    limit there. `plain` reads the point estimates, as near-lossless-v1 was published. `status`
    reads the intervals of `changes`, with alpha = 1 - gate.confidence:

    - PASS iff every check's one-sided bounds at alpha lie within its limit, and there are
      conversations enough to have met what befalls gate.rarest of them (exactly equal scores need
      none). All must hold, so no check needs a correction: the chance to pass a model that breaks
      any limit is at most alpha (intersection-union test; Berger, Technometrics 24, 1982; two
      one-sided tests a check; Schuirmann, J. Pharmacokinetics and Biopharmaceutics 15, 1987).
    - FAIL iff some check's two-sided interval at alpha / (number of checks) lies wholly outside.
      Here one of many is enough, so the error is shared out among them (Bonferroni).
    - INCONCLUSIVE otherwise; with fewer than 8 conversations nothing is sure but what is exactly
      equal.

    The absolute and the relative limit on PPL are two checks: which of them is smaller depends on
    the base's PPL, itself an estimate. JS2D's interval is of the bias-corrected estimate. Without
    `changes`, or with gate.confidence = null, the status is the plain one. generated: changes of
    what the two write, counted in prompts; tasks: of what they answer, by task, counted in samples.
    A check whose data was not gathered (KL, where the engine does not tell likeliest tokens;
    generation and tasks, where they were not asked for) is neither passed nor failed, and without
    it nothing passes. Raises UserError where a report is missing and ValueError where one is empty,
    holds NaN or covers other tokens than its partner.
    """
    limits = settings.limits(dict.fromkeys(pack for pack, _ in base))
    checks: list[GateCheck] = []
    missing: list[str] = []
    for key in [(pack, seq_len) for pack in limits for seq_len in settings.seq_lens]:
        b, c = _pair(key, base, candidate)
        for metric in settings.measured:
            absolute, relative = limits[key[0]].of(metric)
            if absolute is not None and metric.needs is not None and metric.name not in c.further:
                missing.append(f"{metric.change}@{key[0]}/{key[1]}")
            elif absolute is not None:
                value = metric.delta(b, c)
                passed = abs(value) <= absolute
                checks.append(GateCheck(metric.change, *key, value, absolute, passed))
            if relative is not None:
                share = metric.delta(b, c) / b[metric.name]
                passed = abs(share) <= relative
                checks.append(GateCheck(metric.relative_change, *key, share, relative, passed))
    further = _further(generated, tasks)
    for name, place, limit in _asked_further(settings, tasks):
        if (name, place) not in further:
            missing.append(f"{name}@{place}")
            continue
        value = further[name, place][name].value
        checks.append(GateCheck(name, place, 0, value, limit, abs(value) <= limit))
    confidence = None if changes is None else settings.confidence
    if changes is not None and confidence is not None:
        needs = _Needs(confidence, least_rows(settings.rarest, confidence), len(checks))
        checks = [
            _decide(
                check,
                further[check.name, check.pack]
                if check.seq_len == 0
                else changes.get((check.pack, check.seq_len)),
                needs,
            )
            for check in checks
        ]
    outcomes = {check.outcome for check in checks}
    status: Status = "PASS" if outcomes == {"PASS"} and not missing else "INCONCLUSIVE"
    status = "FAIL" if "FAIL" in outcomes else status
    return GateVerdict(settings.name, status, tuple(checks), confidence, tuple(missing))


def _asked_further(
    settings: GateSettings, tasks: Mapping[str, Changes]
) -> Iterator[tuple[str, str, float]]:
    """Change, place and limit of every check of what models write and answer."""
    for name, limit in settings.of_generated.items():
        yield name, GENERATED, limit
    if settings.max_dtask_recovery is not None:
        for task in tasks or (TASKS,):
            yield RECOVERY, task, settings.max_dtask_recovery


def _further(
    generated: Sequence[Changes], tasks: Mapping[str, Changes]
) -> dict[tuple[str, str], Changes]:
    """The changes of those, by change and place."""
    found = {(name, GENERATED): some for some in generated for name in some.estimates}
    return found | {(name, task): some for task, some in tasks.items() for name in some.estimates}


@dataclass(frozen=True)
class _Needs:
    """What decides: bounds within on enough rows, or outside at the error of one of n checks."""

    confidence: float
    least_rows: int
    n_checks: int

    def passes(self, estimate: Estimate, rows: int, limit: float) -> bool:
        low, high = bounds(estimate, rows, self.confidence)
        if low == high == 0:  # the scores are equal
            return True
        return rows >= self.least_rows and -limit <= low and high <= limit

    def fails(self, estimate: Estimate, rows: int, limit: float) -> bool:
        low, high = bounds(estimate, rows, 1 - (1 - self.confidence) / (2 * self.n_checks))
        return low > limit or high < -limit


def _decide(check: GateCheck, changes: Changes | None, needs: _Needs) -> GateCheck:
    """The check with its interval, outcome, and how many rows would settle it."""
    estimate = None if changes is None else changes.get(check.name)
    if changes is None or estimate is None:
        return replace(check, decided="INCONCLUSIVE")
    rows, limit = changes.rows, check.limit
    known = replace(check, estimate=estimate.value, low=estimate.low, high=estimate.high, rows=rows)
    if needs.passes(estimate, rows, limit):
        return replace(known, decided="PASS")
    if needs.fails(estimate, rows, limit):
        return replace(known, decided="FAIL")
    return replace(
        known, decided="INCONCLUSIVE", settled_at=_settled_at(estimate, rows, limit, needs)
    )


def _settled_at(estimate: Estimate, rows: int, limit: float, needs: _Needs) -> int | None:
    """Rows at which the check is decided if value, spread and extremes stay; None: at no number."""
    settled = needs.passes if abs(estimate.value) <= limit else needs.fails

    def enough(more: int) -> bool:
        error = estimate.error * math.sqrt((rows - 1) / (more - 1))
        return settled(replace(estimate, error=error), more, limit)

    most = rows
    while not enough(most):
        most *= 2
        if most > _MOST_ROWS:
            return None
    least = most // 2
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (least, middle) if enough(middle) else (middle, most)
    return most


def _pair(
    key: EvalKey, base: Mapping[EvalKey, PackReport], candidate: Mapping[EvalKey, PackReport]
) -> tuple[PackReport, PackReport]:
    for side, reports in (("base", base), ("candidate", candidate)):
        if key not in reports:
            raise UserError(
                f"the gate needs {key[0]} at seq_len {key[1]}; the {side} has no such report"
            )
        report = reports[key]
        if report.scored_tokens <= 0:
            raise ValueError(f"the {side} report of {key} has no scored tokens")
        own = report.further.values()
        values = (report.ppl, report.cc_rate, report.mean_prob, report.js2d, *own)
        if not all(math.isfinite(value) for value in values):
            raise ValueError(f"the {side} report of {key} holds NaN or infinity: {report}")
    b, c = base[key], candidate[key]
    if b.scored_tokens != c.scored_tokens:
        raise ValueError(
            f"{key}: base scored {b.scored_tokens} tokens, candidate {c.scored_tokens}"
        )
    if (b.blocks, b.rows) != (c.blocks, c.rows):
        raise ValueError(
            f"{key}: base scored {b.blocks} blocks of {b.rows} rows, candidate {c.blocks} of "
            f"{c.rows}"
        )
    return b, c
