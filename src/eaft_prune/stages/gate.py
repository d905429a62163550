"""Reports -> verdict: near-lossless or not, and which inequality failed."""

from __future__ import annotations

import math
from collections.abc import Mapping

from eaft_prune.config import GateSettings
from eaft_prune.types import EvalKey, GateCheck, GateVerdict, PackReport, UserError


def gate(
    settings: GateSettings,
    base: Mapping[EvalKey, PackReport],
    candidate: Mapping[EvalKey, PackReport],
) -> GateVerdict:
    """PASS iff every |candidate - base| is within limit, on the gate's pack at each length.

    |dPPL| <= min(max_dppl, max_dppl_relative * PPL_base); |dCC| <= max_dcc_rate;
    |d mean p| <= max_dmean_prob; JS2D <= max_js2d. Raises UserError where a report is missing and
    ValueError where one is empty, holds NaN or covers other tokens than its partner.
    """
    checks: list[GateCheck] = []
    for seq_len in settings.seq_lens:
        key = (settings.pack, seq_len)
        b, c = _pair(key, base, candidate)
        limits = {
            "dppl": (c.ppl - b.ppl, min(settings.max_dppl, settings.max_dppl_relative * b.ppl)),
            "dcc_rate": (c.cc_rate - b.cc_rate, settings.max_dcc_rate),
            "dmean_prob": (c.mean_prob - b.mean_prob, settings.max_dmean_prob),
            "js2d": (c.js2d, settings.max_js2d),
        }
        checks += [
            GateCheck(name, *key, value, limit, abs(value) <= limit)
            for name, (value, limit) in limits.items()
        ]
    passed = all(check.passed for check in checks)
    return GateVerdict(settings.name, "PASS" if passed else "FAIL", tuple(checks))


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
        values = (report.ppl, report.cc_rate, report.mean_prob, report.js2d)
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
