"""Expert scores -> the experts each layer keeps."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from eaft_prune.config import PruningSettings
from eaft_prune.types import ExpertScores, KeepPlan, UserError

VERSION = 1


def plan(settings: PruningSettings, scores: ExpertScores) -> KeepPlan:
    """Core experts first, then the highest scores, until keep_n; ties go to the lower id.

    The core is the top `core_pos_top_m` by positive mass and the top `core_count_top_m` by count
    (among experts that have any).
    """
    n_experts = scores.score_LE.shape[1]
    kept = []
    for layer in range(len(scores.score_LE)):
        core = {
            *_top(scores.positive_mass_LE[layer], settings.core_pos_top_m),
            *_top(scores.count_LE[layer], settings.core_count_top_m),
        }
        if len(core) > settings.keep_n:
            raise UserError(
                f"layer {layer} has {len(core)} core experts, more than pruning.keep_n = "
                f"{settings.keep_n}: lower pruning.core_pos_top_m or pruning.core_count_top_m"
            )
        ranked = _descending(scores.score_LE[layer])
        rest = [expert for expert in ranked if expert not in core]
        kept.append(tuple(sorted([*core, *rest[: settings.keep_n - len(core)]])))
    return KeepPlan(tuple(kept), n_experts)


def check_keep_n(settings: PruningSettings, n_experts: int, top_k: int) -> None:
    """Raise UserError unless top_k <= keep_n <= n_experts."""
    if not top_k <= settings.keep_n <= n_experts:
        raise UserError(
            f"pruning.keep_n = {settings.keep_n}: this model routes each token to {top_k} of "
            f"{n_experts} experts, so keep_n must be in {top_k}..{n_experts} "
            f"(multiples of {settings.keep_multiple})"
        )


def _descending(values_E: NDArray[np.float64] | NDArray[np.int64]) -> list[int]:
    return [int(i) for i in np.argsort(-values_E, kind="stable")]


def _top(values_E: NDArray[np.float64] | NDArray[np.int64], m: int) -> list[int]:
    return [expert for expert in _descending(values_E)[:m] if values_E[expert] > 0]
