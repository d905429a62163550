"""Expert scores -> the experts each layer keeps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from eaft_prune.config import PruningSettings
from eaft_prune.core.types import ExpertScores, KeepPlan, LayerLosses, UserError
from eaft_prune.maths.allocation import allocate, cheapest, effective_number, fewest

VERSION = 2


def plan(
    settings: PruningSettings,
    scores: ExpertScores,
    losses: LayerLosses | None = None,
    groups: int = 1,
) -> KeepPlan:
    """Core experts first, then the highest scores, until the layer's number; ties to the lower id.

    The core is the top `core_pos_top_m` by positive mass, the top `core_count_top_m` by count and
    each pack's top `pack_floor_top_m` by the positive mass of its tokens (among experts that have
    any). How many a layer keeps is `selection`:

    uniform: keep_n. effective_number: keep_n on average, the total shared out in proportion to
    1 / sum of squared mass shares (inverse Simpson) between min_keep_n and max_keep_n.
    marginal_loss: the same total at the least sum of `losses`, which it needs. coverage:
    the union over packs of the fewest experts that hold `coverage` of the pack's positive mass, in
    the layer's order of scores, at least min_keep_n and at most keep_n. All in multiples of
    keep_multiple. Of a model whose routers choose among `groups` of experts first, each group keeps
    as many as the others. Raises UserError where the core or the total does not fit.
    """
    n_layers, n_experts = scores.score_LE.shape
    cores = [_core(settings, scores, layer) for layer in range(n_layers)]
    covers: list[set[int]] = [set() for _ in cores]
    if settings.selection == "coverage":
        covers = [_cover(settings.coverage, scores.pack_mass_PLE[:, i]) for i in range(n_layers)]
    wanted = [len(a | b) for a, b in zip(cores, covers, strict=True)]
    sizes = _sizes(settings, scores, wanted, losses)
    kept = []
    for layer, (core, cover, size) in enumerate(zip(cores, covers, sizes, strict=True)):
        if len(core) > size:
            raise UserError(
                f"layer {layer} has {len(core)} core experts, more than the {size} it keeps with "
                f"pruning.keep_n = {settings.keep_n}: lower pruning.core_pos_top_m, "
                "core_count_top_m or pack_floor_top_m"
            )
        ranked = descending(scores.score_LE[layer])
        # of each kind in the order of scores
        order = sorted(ranked, key=lambda i: 0 if i in core else 1 if i in cover else 2)
        kept.append(_of_each_group(order, size, n_experts, groups, core, layer))
    return KeepPlan(tuple(kept), n_experts)


def _of_each_group(
    order: Sequence[int], size: int, n_experts: int, groups: int, core: set[int], layer: int
) -> tuple[int, ...]:
    """The first `size` experts of an order, as many of every group; all of the core among them."""
    share, width = size // groups, n_experts // groups
    if size % groups:
        raise UserError(
            f"layer {layer} keeps {size} experts: this model's routers choose among {groups} "
            f"groups first, so it must be a multiple of {groups}; set pruning.keep_multiple so"
        )
    kept = [
        expert
        for group in range(groups)
        for expert in [i for i in order if i // width == group][:share]
    ]
    if lost := core - set(kept):
        raise UserError(
            f"layer {layer}: core experts {sorted(lost)} do not fit, as each of {groups} groups "
            f"keeps {share}: lower pruning.core_pos_top_m, core_count_top_m or pack_floor_top_m"
        )
    return tuple(sorted(kept))


def check_keep_n(
    settings: PruningSettings, n_experts: int, top_k: int, groups: int = 1, least: int = 1
) -> None:
    """Raise UserError unless top_k <= min_keep_n <= keep_n <= max_keep_n <= n_experts.

    Of routers that choose among groups first, all are multiples of the groups, and keep_n leaves
    them the `least` number that their formula needs.
    """
    if settings.keep_n % groups or (
        settings.selection != "uniform" and settings.keep_multiple % groups
    ):
        raise UserError(
            f"pruning.keep_n = {settings.keep_n}: this model's routers choose among {groups} "
            f"groups of experts first, and each must lose as many: give a multiple of {groups} "
            "as pruning.keep_n and, where layers keep different numbers, as pruning.keep_multiple"
        )
    if groups > 1 and settings.keep_n < least:
        raise UserError(
            f"pruning.keep_n = {settings.keep_n}: this model's routers choose some of {groups} "
            f"groups by the best two experts of each and then {top_k} experts of those, so keep_n "
            f"must be in {least}..{n_experts}"
        )
    if groups > 1 and settings.measured:
        raise UserError(
            f"pruning.saliency = {settings.saliency!r} leaves out one expert at a time; this "
            f"model's routers choose among {groups} groups that have as many: use another criterion"
        )
    if not top_k <= settings.keep_n <= n_experts:
        raise UserError(
            f"pruning.keep_n = {settings.keep_n}: this model routes each token to {top_k} of "
            f"{n_experts} experts, so keep_n must be in {top_k}..{n_experts} "
            f"(multiples of {settings.keep_multiple})"
        )
    if settings.selection == "uniform":
        return
    low, high = _bounds(settings, n_experts)
    if not top_k <= low <= settings.keep_n:
        raise UserError(
            f"pruning.min_keep_n = {settings.min_keep_n}: layers of at least {low} experts (a "
            f"multiple of {settings.keep_multiple}); this model routes each token to {top_k}, so "
            f"it must be in {top_k}..{settings.keep_n}"
        )
    if not settings.keep_n <= high <= n_experts:
        raise UserError(
            f"pruning.max_keep_n = {settings.max_keep_n}: layers of at most {high} experts (a "
            f"multiple of {settings.keep_multiple}); it must be in {settings.keep_n}..{n_experts}"
        )


def sizes_to_measure(settings: PruningSettings, n_experts: int) -> list[int]:
    """The numbers of experts that selection=marginal_loss may leave in a layer."""
    low, high = _bounds(settings, n_experts)
    return list(range(low, high + 1, settings.keep_multiple))


def descending(values_E: NDArray[np.float64] | NDArray[np.int64]) -> list[int]:
    """Ids from the largest value down; ties to the lower id."""
    return [int(i) for i in np.argsort(-values_E, kind="stable")]


def _sizes(
    settings: PruningSettings,
    scores: ExpertScores,
    wanted: Sequence[int],
    losses: LayerLosses | None,
) -> Sequence[int]:
    n_layers, n_experts = scores.score_LE.shape
    multiple = settings.keep_multiple
    low, high = _bounds(settings, n_experts)
    match settings.selection:
        case "effective_number":
            demand_L = effective_number(scores.positive_mass_LE)
            return allocate(demand_L, settings.keep_n * n_layers, low, high, multiple)
        case "marginal_loss":
            if losses is None:
                raise UserError(
                    "pruning.selection = 'marginal_loss' measures the model, which this task does "
                    "not do: use it with task=pipeline, prune or profile"
                )
            return cheapest(losses, settings.keep_n * n_layers)
        case "coverage":
            rounded = [-(-n // multiple) * multiple for n in wanted]
            return [min(max(n, low), settings.keep_n) for n in rounded]
    return [settings.keep_n] * n_layers


def _bounds(settings: PruningSettings, n_experts: int) -> tuple[int, int]:
    """Least and most experts a layer may keep, as multiples of keep_multiple."""
    multiple = settings.keep_multiple
    low = -(-(settings.min_keep_n or multiple) // multiple) * multiple
    if settings.max_keep_n is None:
        return low, n_experts // multiple * multiple
    return low, settings.max_keep_n // multiple * multiple


def _core(settings: PruningSettings, scores: ExpertScores, layer: int) -> set[int]:
    core = {
        *_top(scores.positive_mass_LE[layer], settings.core_pos_top_m),
        *_top(scores.count_LE[layer], settings.core_count_top_m),
    }
    for mass_LE in scores.pack_mass_PLE:
        core |= {*_top(mass_LE[layer], settings.pack_floor_top_m)}
    return core


def _cover(share: float, mass_PE: NDArray[np.float64]) -> set[int]:
    return {expert for mass_E in mass_PE for expert in fewest(mass_E, share)}


def _top(values_E: NDArray[np.float64] | NDArray[np.int64], m: int) -> list[int]:
    return [expert for expert in descending(values_E)[:m] if values_E[expert] > 0]
