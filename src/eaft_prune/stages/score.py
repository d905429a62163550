"""Trace -> one number per expert; higher = keep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from eaft_prune.config import PruningSettings
from eaft_prune.core.plugins import load_object
from eaft_prune.core.types import ExpertScores, Trace, UserError
from eaft_prune.maths.regions import REGIONS, regions, soft_regions

VERSION = 2


@dataclass(frozen=True)
class Masses:
    """Summed saliency of every expert by region and by group of tokens (a pack, or a row).

    Scores are linear in the weights of packs and regions, so these few sums give every weighting:
    G groups x 3 regions x L x E numbers instead of T x L x K.
    """

    mass_GRLE: NDArray[np.float64]  # sum of saliency over the selections by the region's tokens
    count_GLE: NDArray[np.int64]  # selections
    tokens_G: NDArray[np.int64]
    pack_G: NDArray[np.int32]  # index into `packs`
    packs: tuple[str, ...]
    region_tokens: dict[str, int]


def score(settings: PruningSettings, trace: Trace) -> ExpertScores:
    """S[l, j] = reduce over selections of expert j in layer l of m_t * w_t * saliency_t.

    saliency is 1, the gate g, the norm n, n^2 or g * n; w_t is 1 or the weight of the token's
    region; m_t the weight of its pack (`pack_weights`). sum: over selections; mean: the sum over
    the summed m_t of the selections. An expert without selections scores 0; higher = keep. REAP is
    (gate_norm, uniform, mean) of arXiv:2510.13999; EAFT-REAP is (gate_norm, eaft, sum). With
    `function` S[l, j] is what the user's own function makes of the trace.
    """
    if settings.function is not None:
        return _score_by_function(settings.function, settings, trace)
    return score_from(settings, masses(settings, trace))


def masses(settings: PruningSettings, trace: Trace, by: Literal["pack", "row"] = "pack") -> Masses:
    """One pass over the trace; of the settings only those of `mass_key` matter.

    Raises ValueError for a trace of no tokens, UserError for a criterion that is not of traces.
    Groups without tokens have masses of zero.
    """
    if settings.measured:
        raise UserError(
            f"pruning.saliency = {settings.saliency!r} is measured by masking experts, not taken "
            "from a routing trace: use it with task=pipeline, prune or profile"
        )
    _check_tokens(trace)
    group_T, pack_G = _groups(trace, by)
    region_T, share_TR = _regions(settings, trace)
    n_groups, n_regions, n_experts = len(pack_G), len(REGIONS), trace.n_experts
    mass, count = [], []
    for layer in range(trace.n_layers):
        ids_TK = trace.experts_TLK[:, layer].astype(np.int64)
        group_TK = ids_TK + n_experts * group_T[:, None]
        count.append(_sums(group_TK, None, (n_groups, n_experts)))
        saliency_TK = _saliency(trace, layer, settings.saliency)
        if share_TR is None:  # a token is in one region: one pass instead of three
            cell_TK = ids_TK + n_experts * (group_T * n_regions + region_T)[:, None]
            mass.append(_sums(cell_TK, saliency_TK, (n_groups, n_regions, n_experts)))
        else:
            shared = [saliency_TK * share_TR[:, [r]] for r in range(n_regions)]
            parts = [_sums(group_TK, part, (n_groups, n_experts)) for part in shared]
            mass.append(np.stack(parts, axis=1))
    return Masses(
        mass_GRLE=np.stack(mass, axis=2),
        count_GLE=np.stack(count, axis=1).astype(np.int64),
        tokens_G=np.bincount(group_T, minlength=n_groups),
        pack_G=pack_G,
        packs=trace.packs,
        region_tokens={name: int(np.sum(region_T == i)) for i, name in enumerate(REGIONS)},
    )


def _check_tokens(trace: Trace) -> None:
    if len(trace) == 0:
        raise ValueError("the routing trace holds no tokens: nothing to score")


def _score_by_function(where: str, settings: PruningSettings, trace: Trace) -> ExpertScores:
    """Scores of the user's function; a pack's masses are the positive scores on its tokens alone.

    Raises UserError unless it gives finite numbers [L, E].
    """
    _check_tokens(trace)
    function = load_object("pruning.function", where)
    shape = (trace.n_layers, trace.n_experts)

    def of(some: Trace) -> NDArray[np.float64]:
        score_LE = np.asarray(function(some), np.float64)
        if score_LE.shape != shape or not np.isfinite(score_LE).all():
            raise UserError(
                f"pruning.function = {where!r} gave an array of shape {score_LE.shape} with "
                f"{int((~np.isfinite(score_LE)).sum())} numbers that are not finite; wanted are "
                f"finite scores {shape}: one for every layer and expert"
            )
        return score_LE

    score_LE = of(trace)
    packs = [trace.pack_T == index for index in range(len(trace.packs))]
    mass_PLE = np.stack(
        [np.maximum(of(trace[there]), 0.0) if there.any() else np.zeros(shape) for there in packs]
    )
    counts = [
        np.bincount(ids_TK.reshape(-1), minlength=trace.n_experts)
        for ids_TK in trace.experts_TLK.transpose(1, 0, 2)
    ]
    region_T, _ = _regions(settings, trace)
    tokens = {name: int(np.sum(region_T == i)) for i, name in enumerate(REGIONS)}
    return ExpertScores(score_LE, np.maximum(score_LE, 0.0), np.stack(counts), tokens, mass_PLE)


def mass_key(settings: PruningSettings) -> tuple[str | float, ...]:
    """What the masses of a trace depend on; all other settings only weigh them."""
    s = settings
    return s.saliency, s.regions, s.quantile, s.high_quantile, s.soft_width


def score_from(
    settings: PruningSettings, masses: Masses, times_G: NDArray[np.int64] | None = None
) -> ExpertScores:
    """The score of one weighting, from masses; microseconds.

    times_G counts each group that often (a bootstrap resample of rows); None: once.
    """
    if times_G is None:
        times_G = np.ones(len(masses.tokens_G), np.int64)
    count_LE = (times_G[:, None, None] * masses.count_GLE).sum(axis=0)
    shape = count_LE.shape
    if settings.saliency == "random":
        score_LE = np.random.default_rng(settings.seed).random(shape)
        pack_mass = np.broadcast_to(score_LE, (len(masses.packs), *shape)).copy()
        return ExpertScores(score_LE, score_LE, count_LE, masses.region_tokens, pack_mass)
    weight_R = np.ones(len(REGIONS))
    if settings.weight == "eaft":
        weight_R = np.array([settings.w_good, settings.w_uncertain, settings.w_conflict])
    weight_G = times_G * pack_weights(settings, masses, times_G)[masses.pack_G]
    score_LE = _weighted(weight_G[:, None] * weight_R, masses.mass_GRLE)
    positive_GR = weight_G[:, None] * np.maximum(weight_R, 0.0)
    of_pack = [masses.pack_G == index for index in range(len(masses.packs))]
    pack_mass = np.stack([_weighted(positive_GR[g], masses.mass_GRLE[g]) for g in of_pack])
    if settings.reduce == "mean":
        weight_LE = _weighted(weight_G, masses.count_GLE)
        score_LE = np.divide(score_LE, weight_LE, out=np.zeros(shape), where=weight_LE > 0)
    return ExpertScores(score_LE, pack_mass.sum(axis=0), count_LE, masses.region_tokens, pack_mass)


def pack_weights(
    settings: PruningSettings, masses: Masses, times_G: NDArray[np.int64]
) -> NDArray[np.float64]:
    """m of every pack's tokens, in the order of `masses.packs`.

    global: the pack's weight, 1 unless named in `pack_weights`. per_file: tokens / (packs x the
    pack's tokens), so that every pack counts as much as any other. per_file_weighted: both,
    multiplied. Raises UserError where no profiled token has weight.
    """
    tokens_P = np.bincount(masses.pack_G, masses.tokens_G * times_G, len(masses.packs))
    given_P = np.array([settings.pack_weights.get(name, 1.0) for name in masses.packs])
    if settings.sampling != "global":
        present = tokens_P > 0
        even = tokens_P.sum() / (present.sum() * np.maximum(tokens_P, 1))
        given_P = given_P * np.where(present, even, 0.0)
    if not (given_P * tokens_P > 0).any():
        raise UserError(
            f"pruning.pack_weights = {settings.pack_weights} leaves no profiled token with weight: "
            f"give one of {', '.join(masses.packs)} a weight above 0"
        )
    return given_P


def _regions(
    settings: PruningSettings, trace: Trace
) -> tuple[NDArray[np.int8], NDArray[np.float64] | None]:
    """Region of every token, and its shares where regions are soft (then: the strict region)."""
    p_T, entropy_T, q = trace.scores.p_T, trace.scores.entropy_T, settings.quantile
    if settings.regions == "soft":
        strict = regions(p_T, entropy_T, "strict", q, settings.high_quantile)
        return strict, soft_regions(p_T, entropy_T, q, settings.soft_width)
    return regions(p_T, entropy_T, settings.regions, q, settings.high_quantile), None


def _groups(
    trace: Trace, by: Literal["pack", "row"]
) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Group of every token, and the pack of every group."""
    if by == "pack":
        return trace.pack_T.astype(np.int64), np.arange(len(trace.packs), dtype=np.int32)
    _, first, group_T = np.unique(trace.row_T, return_index=True, return_inverse=True)
    return group_T.astype(np.int64), trace.pack_T[first].astype(np.int32)


def _saliency(trace: Trace, layer: int, saliency: str) -> NDArray[np.float64]:
    ones = np.ones((len(trace), trace.top_k))
    weights, norms = trace.weights_TLK[:, layer], trace.norms_TLK[:, layer]
    match saliency:
        case "gate":
            return ones * weights
        case "norm":
            return ones * norms
        case "norm2":
            return ones * norms * norms
        case "gate_norm":
            return ones * weights * norms
    return ones  # one; random looks at no mass


def _sums(
    cell_TK: NDArray[np.int64], values_TK: NDArray[np.float64] | None, shape: tuple[int, ...]
) -> NDArray[np.float64]:
    values = None if values_TK is None else values_TK.reshape(-1)
    sums = np.bincount(cell_TK.reshape(-1), values, minlength=int(np.prod(shape)))
    return sums.astype(np.float64).reshape(shape)


def _weighted(
    weights: NDArray[np.float64], masses_LE: NDArray[np.float64] | NDArray[np.int64]
) -> NDArray[np.float64]:
    """Sum of weight x mass over all leading axes, in order: BLAS would follow its threads."""
    flat = masses_LE.reshape(-1, *masses_LE.shape[-2:])
    total: NDArray[np.float64] = (weights.reshape(-1)[:, None, None] * flat).sum(axis=0)
    return total
