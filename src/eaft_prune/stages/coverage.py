"""Trace and plan -> how much of what the router asked for, pack by pack, went with the experts."""

from __future__ import annotations

import numpy as np

from eaft_prune.core.types import Coverage, KeepPlan, Trace

VERSION = 1


def coverage(trace: Trace, plan: KeepPlan) -> Coverage:
    """Share of each pack's gate weight, layer by layer, that dropped experts held; lower is better.

    lost[p, l] = sum of g over selections of dropped experts / sum of g over all, by the pack's
    predictor tokens in the unpruned model. NaN for a pack that no profiled token is of.
    """
    lost_PL = np.full((len(trace.packs), trace.n_layers), np.nan)
    for layer, kept in enumerate(plan.kept):
        dropped_E = np.ones(trace.n_experts, bool)
        dropped_E[list(kept)] = False
        gates_TK = trace.weights_TLK[:, layer].astype(np.float64)
        gone_T = (gates_TK * dropped_E[trace.experts_TLK[:, layer]]).sum(axis=1)
        of_pack = (
            np.bincount(trace.pack_T, x, len(trace.packs)) for x in (gone_T, gates_TK.sum(1))
        )
        gone_P, all_P = of_pack
        np.divide(gone_P, all_P, out=lost_PL[:, layer], where=all_P > 0)
    tokens_P = np.bincount(trace.pack_T, minlength=len(trace.packs)).astype(np.int64)
    return Coverage(trace.packs, tokens_P, lost_PL)
