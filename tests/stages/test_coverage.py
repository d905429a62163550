"""Gate mass that went with the dropped experts, against a loop over selections."""

from __future__ import annotations

import numpy as np

from eaft_prune.core.types import KeepPlan, TokenScores, Trace
from eaft_prune.stages.coverage import coverage


def trace(tokens: int = 60, layers: int = 3, experts: int = 6, k: int = 2) -> Trace:
    rng = np.random.default_rng(0)
    ids = np.argsort(rng.random((tokens, layers, experts)), axis=-1)[..., :k].astype(np.int16)
    gates = rng.random((tokens, layers, k)).astype(np.float32)
    zeros = np.zeros(tokens, np.float32)
    scores = TokenScores(zeros, zeros, zeros.astype(np.int32))
    pack = rng.integers(0, 2, tokens).astype(np.int32)  # of the third there is none
    row = np.zeros(tokens, np.int32)
    return Trace(ids, gates, np.ones_like(gates), scores, pack, row, ("a", "b", "c"), experts)


def test_it_is_a_sum_over_selections() -> None:
    some, plan = trace(), KeepPlan(((0, 1, 2), (1, 3, 4, 5), (0, 5)), 6)
    found = coverage(some, plan)
    for p in range(2):
        for layer, kept in enumerate(plan.kept):
            gone = whole = 0.0
            for t in range(len(some)):
                for slot in range(2):
                    if some.pack_T[t] == p:
                        gate = float(some.weights_TLK[t, layer, slot])
                        whole += gate
                        gone += gate * (some.experts_TLK[t, layer, slot] not in kept)
            np.testing.assert_allclose(found.lost_PL[p, layer], gone / whole, rtol=1e-6)
    assert found.tokens_P.tolist() == [int((some.pack_T == p).sum()) for p in range(3)]
    assert np.isnan(found.lost_PL[2]).all()  # nothing is known of it, which is not 0


def test_nothing_is_lost_where_all_are_kept() -> None:
    found = coverage(trace(), KeepPlan((tuple(range(6)),) * 3, 6))
    assert not found.lost_PL[:2].any()
