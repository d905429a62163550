"""Reports -> verdict: near-lossless or not, or not known yet, and which inequality decides."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from eaft_prune.config import GateSettings
from eaft_prune.core.types import EvalKey, UserError
from eaft_prune.core.verdict import Changes, Estimate, GateCheck, GateVerdict, PackReport, Status
from eaft_prune.maths.intervals import student
from eaft_prune.maths.metrics import Metric


def gate(
    settings: GateSettings,
    base: Mapping[EvalKey, PackReport],
    candidate: Mapping[EvalKey, PackReport],
    changes: Mapping[EvalKey, Changes] | None = None,
) -> GateVerdict:
    """Every |candidate - base| within its limit, on the gate's packs at each length.

    |dPPL| <= min(max_dppl, max_dppl_relative * PPL_base); |dCC| <= max_dcc_rate;
    |d mean p| <= max_dmean_prob; JS2D <= max_js2d; the change of a metric of `gate.metrics` <= its
    limit there. `plain` reads the point estimates, as near-lossless-v1 was published. `status`
    reads the intervals of `changes`, with alpha = 1 - gate.confidence:

    - PASS iff every check's one-sided bounds at alpha lie within its limit. All must hold, so no
      check needs a correction: the chance to pass a model that breaks any limit is at most alpha
      (intersection-union test; Berger, Technometrics 24, 1982; two one-sided tests a check;
      Schuirmann, J. Pharmacokinetics and Biopharmaceutics 15, 1987).
    - FAIL iff some check's two-sided interval at alpha / (number of checks) lies wholly outside.
      Here one of many is enough, so the error is shared out among them (Bonferroni).
    - INCONCLUSIVE otherwise; with fewer than 4 blocks nothing is sure but what is exactly equal.

    A relative limit moves with the base's perplexity: its check is decided on PPL / PPL_base - 1.
    JS2D's interval is of the bias-corrected estimate. Without `changes`, or with gate.confidence =
    null, the status is the plain one. Raises UserError where a report is missing and ValueError
    where one is empty, holds NaN or covers other tokens than its partner.
    """
    limits = settings.limits(dict.fromkeys(pack for pack, _ in base))
    checks: list[GateCheck] = []
    estimates: list[Estimate | None] = []
    for key in [(pack, seq_len) for pack in limits for seq_len in settings.seq_lens]:
        b, c = _pair(key, base, candidate)
        for metric in settings.measured:
            absolute, share = limits[key[0]].of(metric)
            relative = None if share is None else share * b[metric.name]
            limit = min((x for x in (absolute, relative) if x is not None), default=None)
            if limit is None:
                continue
            value = metric.delta(b, c)
            checks.append(GateCheck(metric.change, *key, value, limit, abs(value) <= limit))
            known = (changes or {}).get(key)
            estimates.append(
                None if known is None else _estimate(known, metric, b, limit == relative)
            )
    confidence = None if changes is None else settings.confidence
    if confidence is not None:
        checks = [
            _decide(check, estimate, confidence, len(checks), base[check.pack, check.seq_len])
            for check, estimate in zip(checks, estimates, strict=True)
        ]
    outcomes = {check.outcome for check in checks}
    status: Status = "PASS" if outcomes == {"PASS"} else "INCONCLUSIVE"
    status = "FAIL" if "FAIL" in outcomes else status
    return GateVerdict(settings.name, status, tuple(checks), confidence)


def _estimate(changes: Changes, metric: Metric, base: PackReport, relative: bool) -> Estimate:
    """Of the change; where the limit moves with the base's number, of their ratio."""
    if not relative:
        return changes[metric.change]
    ratio, size = changes[metric.relative_change], base[metric.name]
    return Estimate(*(size * x for x in (ratio.value, ratio.error, ratio.low, ratio.high)))


def _decide(
    check: GateCheck, estimate: Estimate | None, confidence: float, n_checks: int, base: PackReport
) -> GateCheck:
    """The check with its interval, outcome, and how many blocks would settle it."""
    if estimate is None:
        return replace(check, decided="INCONCLUSIVE")
    value, error, limit = estimate.value, estimate.error, check.limit
    known = replace(check, estimate=value, low=estimate.low, high=estimate.high)
    inside = student(confidence, base.blocks)
    outside = student(1 - (1 - confidence) / (2 * n_checks), base.blocks)
    if -limit <= estimate.low and estimate.high <= limit:
        return replace(known, decided="PASS")
    if abs(value) - outside * error > limit:
        return replace(known, decided="FAIL")
    margin = limit - abs(value)
    reach = (inside if margin >= 0 else outside) * error
    # the standard error falls as 1 / sqrt(blocks)
    needed = math.ceil(base.blocks * (reach / margin) ** 2) if margin else None
    return replace(known, decided="INCONCLUSIVE", settled_at=needed)


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
    if b.blocks != c.blocks:
        raise ValueError(f"{key}: base scored {b.blocks} blocks, candidate {c.blocks}")
    return b, c
