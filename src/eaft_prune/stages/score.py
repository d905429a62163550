"""Trace -> one number per expert; higher = keep."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from eaft_prune.config import PruningSettings, Regions
from eaft_prune.metrics import thresholds
from eaft_prune.types import ExpertScores, Trace

VERSION = 1
REGIONS = ("good", "uncertain", "conflict")


def score(settings: PruningSettings, trace: Trace) -> ExpertScores:
    """S[l, j] = reduce over selections of expert j in layer l of w_t * saliency_t.

    saliency is one of 1, gate g, norm n, g * n; w_t is 1 or the weight of the token's region;
    reduce is the sum or the mean over selections. An expert without selections scores 0. REAP is
    (gate_norm, uniform, mean) of arXiv:2510.13999; EAFT-REAP is (gate_norm, eaft, sum).
    """
    if len(trace) == 0:
        raise ValueError("the routing trace holds no tokens: nothing to score")
    names = regions(
        trace.scores.p_T,
        trace.scores.entropy_T,
        settings.regions,
        settings.quantile,
        settings.high_quantile,
    )
    weight_T = np.ones(len(trace))
    if settings.weight == "eaft":
        weights = (settings.w_good, settings.w_uncertain, settings.w_conflict)
        weight_T = np.array(weights)[names]
    counts = [_per_expert(trace, layer, None) for layer in range(trace.n_layers)]
    count_LE = np.stack(counts).astype(np.int64)
    if settings.saliency == "random":
        score_LE = np.random.default_rng(settings.seed).random(count_LE.shape)
        positive_LE = score_LE
    else:
        score_LE, positive_LE = _sums(trace, settings.saliency, weight_T)
        if settings.reduce == "mean":
            score_LE = score_LE / np.maximum(count_LE, 1)
    region_tokens = {name: int(np.sum(names == i)) for i, name in enumerate(REGIONS)}
    return ExpertScores(score_LE, positive_LE, count_LE, region_tokens)


def regions(
    p_T: NDArray[np.float64],
    entropy_T: NDArray[np.float32],
    kind: Regions,
    quantile: float,
    high_quantile: float,
) -> NDArray[np.int8]:
    """Region of every token as an index into `REGIONS`.

    strict: good = p >= p_q and H <= H_q; conflict = p < p_q and H <= H_q; uncertain = the rest.
    policy: conflict = p <= p_q and H <= H_q; uncertain = p <= p_q and H >= H_hi; good = the rest.
    Thresholds are quantiles over the given tokens.
    """
    p_q, h_q = thresholds(p_T, entropy_T, quantile)
    entropy = entropy_T.astype(np.float64)
    if kind == "strict":
        sure = entropy <= h_q
        return np.where(sure, np.where(p_T >= p_q, 0, 2), 1).astype(np.int8)
    _, h_hi = thresholds(p_T, entropy_T, high_quantile)
    wrong = p_T <= p_q
    region = np.zeros(len(p_T), np.int8)
    region[wrong & (entropy >= h_hi)] = 1
    region[wrong & (entropy <= h_q)] = 2
    return region


def _sums(
    trace: Trace, saliency: str, weight_T: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    factors: Mapping[str, tuple[NDArray[np.float32], ...]] = {
        "one": (),
        "gate": (trace.gates_TLK,),
        "norm": (trace.norms_TLK,),
        "gate_norm": (trace.gates_TLK, trace.norms_TLK),
    }
    total, positive = [], []
    for layer in range(trace.n_layers):
        contribution_TK = np.repeat(weight_T[:, None], trace.top_k, axis=1)
        for factor_TLK in factors[saliency]:
            contribution_TK = contribution_TK * factor_TLK[:, layer]
        total.append(_per_expert(trace, layer, contribution_TK))
        positive.append(_per_expert(trace, layer, np.maximum(contribution_TK, 0.0)))
    return np.stack(total), np.stack(positive)


def _per_expert(
    trace: Trace, layer: int, values_TK: NDArray[np.float64] | None
) -> NDArray[np.float64]:
    ids = trace.experts_TLK[:, layer].reshape(-1)
    values = None if values_TK is None else values_TK.reshape(-1)
    return np.bincount(ids, values, minlength=trace.n_experts).astype(np.float64)
