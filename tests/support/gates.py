"""The shipped gate, and reports and changes for it to judge."""

from __future__ import annotations

import math
from typing import Any

import yaml
from scipy.stats import t as student_t
from support.runs import REPOSITORY

from eaft_prune.config import GateSettings
from eaft_prune.core.types import EvalKey, TokenScores
from eaft_prune.core.verdict import Changes, Estimate, PackReport
from eaft_prune.maths.intervals import changes

LENGTHS = (1024, 2048)
ROWS = 400  # enough for PASS at 95%, which takes 299, and 381 at 97.8%
ZERO = Estimate(0.0, 0.0, 0.0, 0.0)


def v1(**changes: Any) -> GateSettings:
    """The shipped near-lossless gate."""
    return GateSettings(
        **{
            **yaml.safe_load((REPOSITORY / "conf/gate/near_lossless_v1.yaml").read_text()),
            **changes,
        }
    )


def report(
    ppl: float = 5.0, cc: float = 0.001, p: float = 0.5, js: float = 0.0, **changes: Any
) -> PackReport:
    values: dict[str, Any] = {
        "ppl": ppl, "mean_prob": p, "mean_entropy": 0.4, "cc_rate": cc, "cc_rate_base_thr": cc,
        "js2d": js, "js2d_corrected": 0.0, "scored_tokens": 1000, "blocks": 4, "rows": 4,
    }  # fmt: skip
    return PackReport(**{**values, **changes})


def both(**changes: Any) -> dict[EvalKey, PackReport]:
    return {("UNION", seq_len): report(**changes) for seq_len in LENGTHS}


def around(value: float, error: float, confidence: float = 0.95) -> Estimate:
    """Bounds of many small influences, of which none stands out."""
    reach = student_t.ppf(confidence, ROWS) * error * math.sqrt((ROWS - 1) / (ROWS + 1))
    return Estimate(value, error, value - reach, value + reach)


def changed(**estimates: Estimate) -> Changes:
    names = ("dppl", "dppl_relative", "dnll", "dcc_rate", "dmean_prob", "dmean_entropy", "js2d")
    return Changes(ROWS, dict.fromkeys(names, ZERO) | estimates)


def intervals(
    base: TokenScores, other: TokenScores, quantile: float, settings: GateSettings
) -> Changes | None:
    """The changes as a comparison under this gate takes them, of a conversation a block."""
    return changes(
        base, other, base.block_T, quantile,
        confidence=settings.confidence, metrics=settings.measured,
    )  # fmt: skip
