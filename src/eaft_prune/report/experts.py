"""Which experts went and how close it was: per layer ranks, scaled scores, tie zones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eaft_prune.core.outcome import Selection
from eaft_prune.core.verdict import Comparison

TIE_FRACTION = 0.02


@dataclass(frozen=True)
class ExpertMap:
    """What the heat maps show of one selection; all arrays are [L, E]."""

    criterion: str
    score_LE: NDArray[np.float64]
    rank_LE: NDArray[np.int64]  # 0 = highest score of the layer
    scaled_LE: NDArray[np.float64]  # score mapped to [0, 1] within the layer
    load_LE: NDArray[np.float64]  # share of the layer's selections times E: 1 = even
    count_LE: NDArray[np.int64]
    kept_LE: NDArray[np.bool_]
    tied_LE: NDArray[np.bool_]


def selections_of(
    comparison: Comparison, selection: Selection | Mapping[str, Selection] | None
) -> dict[str, Selection]:
    """Selection by candidate label; one selection alone holds for every candidate.

    Raises ValueError where a selection is named after no candidate, or plan and scores differ in
    shape.
    """
    labels = [candidate.model for candidate in comparison.candidates]
    if selection is None:
        return {}
    if isinstance(selection, Selection):
        selection = dict.fromkeys(labels, selection)
    strange = [label for label in selection if label not in labels]
    if strange:
        raise ValueError(f"selections of {strange}, but the candidates are {labels}")
    for label, one in selection.items():
        planned = (len(one.plan.kept), one.plan.n_experts)
        if not one.scores.score_LE.shape == one.scores.count_LE.shape == planned:
            raise ValueError(
                f"selection of {label!r}: the plan is for [layers, experts] = {planned}, "
                f"the scores are {one.scores.score_LE.shape}"
            )
        if not np.isfinite(one.scores.score_LE).all():
            raise ValueError(f"selection of {label!r}: scores hold NaN or infinity")
    return {label: selection[label] for label in labels if label in selection}


def expert_map(selection: Selection) -> ExpertMap:
    """Ranks (ties to the lower id), scaled scores and tie zones of one selection."""
    score = selection.scores.score_LE
    low, spread = score.min(axis=1, keepdims=True), np.ptp(score, axis=1, keepdims=True)
    order = np.argsort(-score, axis=1, kind="stable")
    count = selection.scores.count_LE
    kept = np.zeros(score.shape, dtype=bool)
    for layer, ids in enumerate(selection.plan.kept):
        kept[layer, list(ids)] = True
    return ExpertMap(
        criterion=method(selection),
        score_LE=score,
        rank_LE=np.argsort(order, axis=1, kind="stable"),
        scaled_LE=(score - low) / np.where(spread > 0, spread, 1.0),
        load_LE=count * score.shape[1] / np.maximum(count.sum(axis=1, keepdims=True), 1),
        count_LE=count,
        kept_LE=kept,
        tied_LE=near_the_cut(score, kept.sum(axis=1)),
    )


def method(selection: Selection) -> str:
    """The criterion, and what was done to the experts it kept."""
    level = selection.settings.get("compensation", "none")
    return selection.criterion + ("" if level == "none" else f" with compensation={level}")


def near_the_cut(score_LE: NDArray[np.float64], keep_n_L: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Experts whose score is within 2% of the layer's spread of the cut.

    The cut lies midway between the keep_n-th and the next score; a layer that keeps all has none.
    """
    tied = np.zeros(score_LE.shape, dtype=bool)
    for layer, keep_n in enumerate(keep_n_L):
        ranked = np.sort(score_LE[layer])[::-1]
        if keep_n < len(ranked):
            cut = (ranked[keep_n - 1] + ranked[keep_n]) / 2
            tied[layer] = abs(score_LE[layer] - cut) < TIE_FRACTION * (ranked[0] - ranked[-1])
    return tied
