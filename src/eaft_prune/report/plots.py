"""The arrays behind the plots of the HTML report, small enough to embed as JSON."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eaft_prune.core.outcome import Selection
from eaft_prune.core.types import EvalKey, Evaluation, TokenScores
from eaft_prune.core.verdict import Comparison
from eaft_prune.maths.divergence import H_BINS, P_BINS, histogram2d
from eaft_prune.maths.formulas import check_scores, thresholds
from eaft_prune.report.experts import ExpertMap, expert_map
from eaft_prune.report.summary import ordered_keys

SAMPLE_TOKENS = 2_000
SAMPLE_SEED = 0
MOVED = 0.1  # |p_candidate - p_base| from which a token counts as moved
FULL_RESOLUTION_HISTOGRAMS = 64  # above this many, bins are merged 2 x 2

Json = dict[str, Any]


def plot_data(
    comparison: Comparison, selections: Mapping[str, Selection], cc_quantile: float
) -> Json:
    """Histograms, thresholds, paired samples and expert maps, as the report's script reads them.

    Raises ValueError where base and candidate were not scored on the same tokens in the same order.
    """
    base, candidates = comparison.base, comparison.candidates
    keys = ordered_keys(comparison.reports[base.model])
    merge = 1 if len(keys) * (1 + len(candidates)) <= FULL_RESOLUTION_HISTOGRAMS else 2
    maps: list[Selection] = []
    for selection in selections.values():
        if not any(selection is other for other in maps):
            maps.append(selection)
    return {
        "base": base.model,
        "candidates": [candidate.model for candidate in candidates],
        "quantile": cc_quantile,
        "bins": [P_BINS // merge, H_BINS // merge],
        "moved": MOVED,
        "views": [_view(key, base, candidates, cc_quantile, merge) for key in keys],
        "experts": [_expert_json(expert_map(selection)) for selection in maps],
        "expertsOf": {
            label: next(i for i, other in enumerate(maps) if selection is other)
            for label, selection in selections.items()
        },
    }


def _view(
    key: EvalKey,
    base: Evaluation,
    candidates: tuple[Evaluation, ...],
    cc_quantile: float,
    merge: int,
) -> Json:
    for evaluation in (base, *candidates):
        _check_paired(key, base, evaluation)
    reference = base.scores[key]
    rng = np.random.default_rng(SAMPLE_SEED)
    size = min(SAMPLE_TOKENS, len(reference))
    sample = np.sort(rng.choice(len(reference), size, replace=False))
    return {
        "pack": key[0],
        "seqLen": key[1],
        "tokens": len(reference),
        "base": _model(reference, reference, sample, cc_quantile, merge),
        "candidates": [
            _model(candidate.scores[key], reference, sample, cc_quantile, merge)
            for candidate in candidates
        ],
    }


def _model(
    scores: TokenScores,
    base: TokenScores,
    sample: NDArray[np.int64],
    cc_quantile: float,
    merge: int,
) -> Json:
    p = scores.p_T
    p_q, h_q = thresholds(p, scores.entropy_T, cc_quantile)
    counts = histogram2d(p, scores.entropy_T)
    merged = counts.reshape(P_BINS // merge, merge, H_BINS // merge, merge).sum(axis=(1, 3))
    return {
        "histogram": packed(merged),
        "pq": round(p_q, 6),
        "hq": round(h_q, 6),
        "sample": packed(np.round(p[sample].clip(0, 1) * 65_535)),  # p in steps of 1/65535
        "moved": int((abs(p - base.p_T) > MOVED).sum()),
    }


def _check_paired(key: EvalKey, base: Evaluation, other: Evaluation) -> None:
    for evaluation in (base, other):
        if key not in evaluation.scores:
            raise ValueError(f"{evaluation.model!r} has a report of {key} but no token scores")
    check_scores(other.scores[key], f"{other.model!r} on {key}")
    ours, theirs = base.token_digests.get(key), other.token_digests.get(key)
    if ours != theirs or len(base.scores[key]) != len(other.scores[key]):
        raise ValueError(
            f"{base.model!r} and {other.model!r} scored different tokens of {key} "
            f"({len(base.scores[key])} and {len(other.scores[key])}; digests {ours} and {theirs})"
        )


def _expert_json(experts: ExpertMap) -> Json:
    return {
        "criterion": experts.criterion,
        "shape": list(experts.kept_LE.shape),
        "score": [float(f"{value:.5g}") for value in experts.score_LE.ravel()],
        "rank": packed(experts.rank_LE),
        "scaled": [round(float(value), 4) for value in experts.scaled_LE.ravel()],
        "load": [round(float(value), 3) for value in experts.load_LE.ravel()],
        "count": packed(experts.count_LE),
        "kept": packed(experts.kept_LE),
        "tied": packed(experts.tied_LE),
    }


def packed(values: NDArray[Any]) -> Json:
    """Non-negative whole numbers as base64 of the narrowest little-endian unsigned type."""
    top = int(values.max(initial=0))
    if top >= 2**32:
        raise ValueError(f"{top} does not fit 32 bits")
    bits = 8 if top < 2**8 else 16 if top < 2**16 else 32
    raw = np.ascontiguousarray(values, dtype=f"<u{bits // 8}").tobytes()
    return {"bits": bits, "data": base64.b64encode(raw).decode("ascii")}
