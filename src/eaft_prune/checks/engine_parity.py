"""Two engines on the same tokens of the same model: how far apart are log p, H and the metrics?"""

from __future__ import annotations

import numpy as np

from eaft_prune.core.types import TokenScores
from eaft_prune.maths.metrics import pack_report

_METRICS = ("ppl", "mean_prob", "mean_entropy", "cc_rate", "cc_rate_base_thr")


def parity(ours: TokenScores, theirs: TokenScores, cc_quantile: float) -> dict[str, float]:
    """max and mean |d ln p| and |d H| over tokens, theirs - ours of every metric, and JS2D.

    Raises ValueError where the two were not measured on the same tokens.
    """
    mine, other = (pack_report(scores, ours, cc_quantile) for scores in (ours, theirs))
    logp = np.abs(theirs.logp_T.astype(np.float64) - ours.logp_T)
    entropy = np.abs(theirs.entropy_T.astype(np.float64) - ours.entropy_T)
    return {
        "max_dlogp": float(logp.max()),
        "mean_dlogp": float(logp.mean()),
        "max_dentropy": float(entropy.max()),
        "mean_dentropy": float(entropy.mean()),
        **{f"d{name}": getattr(other, name) - getattr(mine, name) for name in _METRICS},
        "js2d": other.js2d,
        "tokens": float(len(ours)),
    }
