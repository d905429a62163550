"""Scores are a loop over tokens, layers and selections; nothing more."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.traces import EXPERTS, LAYERS, K, T, pruning, trace

from eaft_prune.config import PruningSettings
from eaft_prune.core.types import ExpertScores, TokenScores, Trace, UserError
from eaft_prune.maths.regions import REGIONS, regions, soft_regions
from eaft_prune.stages.score import mass_key, masses, score, score_from

SALIENCIES = ("one", "gate", "norm", "norm2", "gate_norm")


def quantile(values: np.ndarray[Any, Any], q: float) -> float:
    """Linear interpolation between order statistics, written out."""
    ordered = sorted(float(v) for v in values)
    place = q * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def region_of(kind: str, p: float, h: float, p_q: float, h_q: float, h_hi: float) -> str:
    if kind == "strict":
        if p >= p_q and h <= h_q:
            return "good"
        return "conflict" if p < p_q and h <= h_q else "uncertain"
    if p <= p_q and h <= h_q:
        return "conflict"
    return "uncertain" if p <= p_q and h >= h_hi else "good"


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def shares_of(
    s: PruningSettings, p: np.ndarray[Any, Any], h: np.ndarray[Any, Any], i: int
) -> dict[str, float]:
    """Shares of token i in the three regions."""
    p_q, h_q, h_hi = quantile(p, s.quantile), quantile(h, s.quantile), quantile(h, s.high_quantile)
    if s.regions != "soft":
        return {region_of(s.regions, p[i], h[i], p_q, h_q, h_hi): 1.0}

    def middle(values: np.ndarray[Any, Any]) -> float:
        return sum(v < values[i] for v in values) + sum(v == values[i] for v in values) / 2

    n = len(p)
    right = sigmoid((middle(p) - sum(v < p_q for v in p)) / n / s.soft_width)
    sure = sigmoid((sum(v <= h_q for v in h) - middle(h)) / n / s.soft_width)
    return {"good": sure * right, "uncertain": 1 - sure, "conflict": sure * (1 - right)}


def multiplier(s: PruningSettings, t: Trace, i: int) -> float:
    """How much token i counts for the pack it is of."""
    tokens = Counter(t.pack_T.tolist())
    pack = int(t.pack_T[i])
    given = s.pack_weights.get(t.packs[pack], 1.0)
    return given if s.sampling == "global" else given * len(t) / len(tokens) / tokens[pack]


def naive(s: PruningSettings, t: Trace) -> tuple[Any, Any, Any, dict[str, int]]:
    """score, positive mass, count and region tokens, by a loop over tokens, layers, selections."""
    p, h = np.exp(t.scores.logp_T.astype(float)), t.scores.entropy_T.astype(float)
    p_q, h_q, h_hi = quantile(p, s.quantile), quantile(h, s.quantile), quantile(h, s.high_quantile)
    weights = {"good": s.w_good, "uncertain": s.w_uncertain, "conflict": s.w_conflict}
    shape = (t.n_layers, t.n_experts)
    total, positive, count = np.zeros(shape), np.zeros(shape), np.zeros(shape, int)
    counted = np.zeros(shape)
    tokens = dict.fromkeys(REGIONS, 0)
    for i in range(len(t)):
        hard = "strict" if s.regions == "soft" else s.regions
        tokens[region_of(hard, p[i], h[i], p_q, h_q, h_hi)] += 1
        shares, times = shares_of(s, p, h, i), multiplier(s, t, i)
        for layer in range(t.n_layers):
            for k in range(t.top_k):
                expert = int(t.experts_TLK[i, layer, k])
                value = times
                if "gate" in s.saliency:
                    value *= float(t.weights_TLK[i, layer, k])
                if "norm" in s.saliency:
                    value *= float(t.norms_TLK[i, layer, k])
                if s.saliency == "norm2":
                    value *= float(t.norms_TLK[i, layer, k])
                for region, share in shares.items():
                    weight = weights[region] if s.weight == "eaft" else 1.0
                    total[layer, expert] += weight * share * value
                    positive[layer, expert] += max(weight, 0.0) * share * value
                count[layer, expert] += 1
                counted[layer, expert] += times
    if s.reduce == "mean":
        total = np.divide(total, counted, out=np.zeros(shape), where=counted > 0)
    return total, positive, count, tokens


@pytest.mark.parametrize("kind", ["strict", "policy", "soft"])
@pytest.mark.parametrize("reduce", ["sum", "mean"])
@pytest.mark.parametrize("weight", ["uniform", "eaft"])
@pytest.mark.parametrize("saliency", SALIENCIES)
def test_scores_are_a_loop_over_tokens(saliency: str, weight: str, reduce: str, kind: str) -> None:
    for seed, steps in ((0, 0), (1, 6)):
        t = trace(seed, steps=steps)
        s = pruning(saliency=saliency, weight=weight, reduce=reduce, regions=kind)
        total, positive, count, tokens = naive(s, t)
        result = score(s, t)
        np.testing.assert_allclose(result.score_LE, total, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(result.positive_mass_LE, positive, rtol=1e-10, atol=1e-12)
        assert np.array_equal(result.count_LE, count)
        assert dict(result.region_tokens) == tokens
        assert (result.score_LE[:, -1] == 0).all()  # never selected


@settings(max_examples=30)
@given(
    seed=st.integers(0, 10**6),
    tokens=st.integers(1, 40),
    low=st.floats(0.01, 0.6),
    high=st.floats(0.3, 0.99),
    weights=st.tuples(*[st.floats(-5, 5)] * 3),
    kind=st.sampled_from(["strict", "policy"]),
    steps=st.sampled_from([0, 2, 5]),
)
def test_scores_are_the_loop_for_any_settings(
    seed: int, tokens: int, low: float, high: float, weights: Any, kind: str, steps: int
) -> None:
    t = trace(seed, tokens, steps=steps)
    good, uncertain, conflict = weights
    s = pruning(
        regions=kind, quantile=low, high_quantile=high,
        w_good=good, w_uncertain=uncertain, w_conflict=conflict,
    )  # fmt: skip
    # the oracle's quantile and numpy's may differ by an ulp, which moves a token sitting on it
    p, h = np.exp(t.scores.logp_T.astype(float)), t.scores.entropy_T.astype(float)
    edges = [(p, quantile(p, low)), (h, quantile(h, low)), (h, quantile(h, high))]
    for values, edge in edges:
        gap = np.abs(values - edge)
        if ((gap > 0) & (gap < 1e-12)).any():
            return
    total, positive, _, found = naive(s, t)
    result = score(s, t)
    assert dict(result.region_tokens) == found
    np.testing.assert_allclose(result.score_LE, total, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(result.positive_mass_LE, positive, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["strict", "policy"])
def test_regions_cover_every_token_once_and_all_occur(kind: Any) -> None:
    t = trace(3, 400)
    names = regions(t.scores.p_T, t.scores.entropy_T, kind, 0.15, 0.85)
    assert len(names) == 400
    assert set(names.tolist()) == {0, 1, 2}
    result = score(pruning(regions=kind), t)
    assert sum(result.region_tokens.values()) == 400


def test_thresholds_are_numpys_quantiles_of_the_profiled_tokens() -> None:
    t = trace(4, 37)
    p, h = t.scores.p_T, t.scores.entropy_T.astype(float)
    names = regions(p, t.scores.entropy_T, "strict", 0.3, 0.85)
    conflict = (p < np.quantile(p, 0.3)) & (h <= np.quantile(h, 0.3))
    assert np.array_equal(names == REGIONS.index("conflict"), conflict)
    assert conflict.any()


def test_a_token_on_the_threshold_is_good_in_strict_and_conflict_in_policy() -> None:
    """p equal to its quantile and H at its quantile: >= in one definition, <= in the other."""
    p, h = np.full(9, 0.5), np.full(9, 0.5, np.float32)
    assert set(regions(p, h, "strict", 0.15, 0.85).tolist()) == {REGIONS.index("good")}
    assert set(regions(p, h, "policy", 0.15, 0.85).tolist()) == {REGIONS.index("conflict")}


@pytest.mark.parametrize(
    ("saliency", "reduce"), list(itertools.product(SALIENCIES, ["sum", "mean"]))
)
def test_permuting_experts_permutes_scores(saliency: str, reduce: str) -> None:
    t = trace(5)
    order = np.random.default_rng(0).permutation(EXPERTS)  # old expert i is new order[i]
    moved = Trace(**{**vars(t), "experts_TLK": order[t.experts_TLK].astype(np.int16)})
    s = pruning(saliency=saliency, reduce=reduce)
    before, after = score(s, t), score(s, moved)
    for name in ("score_LE", "positive_mass_LE", "count_LE"):
        assert np.array_equal(getattr(after, name)[:, order], getattr(before, name)), name


def test_permuting_tokens_or_slots_changes_nothing() -> None:
    t = trace(6)
    rng = np.random.default_rng(0)
    tokens, slots = rng.permutation(T), rng.permutation(K)
    routed = {
        name: getattr(t, name)[tokens][:, :, slots]
        for name in ("experts_TLK", "weights_TLK", "norms_TLK")
    }
    scores = TokenScores(
        t.scores.logp_T[tokens], t.scores.entropy_T[tokens], t.scores.block_T[tokens]
    )
    moved = Trace(**{**vars(t), **routed, "scores": scores})
    np.testing.assert_allclose(
        score(pruning(), moved).score_LE, score(pruning(), t).score_LE, rtol=1e-10, atol=1e-10
    )


@given(st.tuples(*[st.floats(-4, 4)] * 3), st.sampled_from(SALIENCIES), st.booleans())
def test_a_signed_score_is_linear_in_the_weights(
    weights: tuple[float, float, float], saliency: str, mean: bool
) -> None:
    """Three unit weightings give every other one: masses per region are all that is needed."""
    t = trace(7)

    def of(good: float, uncertain: float, conflict: float) -> ExpertScores:
        named = {"w_good": good, "w_uncertain": uncertain, "w_conflict": conflict}
        return score(pruning(saliency=saliency, reduce="mean" if mean else "sum", **named), t)

    units = [of(*unit).score_LE for unit in np.eye(3)]
    expected = sum(w * unit for w, unit in zip(weights, units, strict=True))
    np.testing.assert_allclose(of(*weights).score_LE, expected, rtol=1e-9, atol=1e-9)


def test_equal_weights_are_no_weights() -> None:
    t = trace(8)
    ones = pruning(w_good=1.0, w_uncertain=1.0, w_conflict=1.0)
    assert np.array_equal(score(ones, t).score_LE, score(pruning(weight="uniform"), t).score_LE)


def test_frequency_counts_selections() -> None:
    t = trace(9)
    result = score(pruning(saliency="one", weight="uniform"), t)
    assert np.array_equal(result.score_LE, result.count_LE)
    assert result.count_LE.sum(axis=1).tolist() == [T * K] * LAYERS


def test_random_scores_know_the_seed_and_nothing_else() -> None:
    def of(seed: int, t: Trace) -> np.ndarray[Any, Any]:
        return score(pruning(saliency="random", seed=seed), t).score_LE

    assert np.array_equal(of(0, trace(1)), of(0, trace(2)))
    assert not np.array_equal(of(0, trace(1)), of(1, trace(1)))
    assert not np.array_equal(of(0, trace(1))[0], of(0, trace(1))[1])  # layers differ
    assert of(0, trace(1)).shape == (LAYERS, EXPERTS)


def test_a_score_of_no_tokens_is_an_error() -> None:
    with pytest.raises(ValueError, match="no tokens"):
        score(pruning(), trace(0, tokens=0))


SAMPLINGS: list[dict[str, Any]] = [
    {"pack_weights": {"b": 3.0, "c": 0.0}},
    {"sampling": "per_file"},
    {"sampling": "per_file_weighted", "pack_weights": {"a": 2.0, "b": 0.5}},
]


@pytest.mark.parametrize("reduce", ["sum", "mean"])
@pytest.mark.parametrize("weight", ["uniform", "eaft"])
@pytest.mark.parametrize("how", SAMPLINGS)
def test_pack_weights_multiply_the_tokens_of_their_pack(how: Any, weight: str, reduce: str) -> None:
    t = trace(10)
    s = pruning(weight=weight, reduce=reduce, **how)
    total, positive, count, _ = naive(s, t)
    result = score(s, t)
    np.testing.assert_allclose(result.score_LE, total, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(result.positive_mass_LE, positive, rtol=1e-10, atol=1e-12)
    assert np.array_equal(result.count_LE, count)  # selections, whatever they weigh
    assert not np.allclose(
        result.score_LE, score(pruning(weight=weight, reduce=reduce), t).score_LE
    )


def test_a_pack_of_weight_zero_is_as_if_its_tokens_were_not_there() -> None:
    t = trace(11)
    there = t.pack_T != 1
    routed = {
        name: getattr(t, name)[there]
        for name in ("experts_TLK", "weights_TLK", "norms_TLK", "pack_T", "row_T")
    }
    scores = TokenScores(*(getattr(t.scores, n)[there] for n in ("logp_T", "entropy_T", "block_T")))
    without = Trace(**{**vars(t), **routed, "scores": scores})
    s = pruning(weight="uniform", reduce="mean")
    weighted = score(s.model_copy(update={"pack_weights": {"b": 0.0}}), t)
    assert np.array_equal(weighted.score_LE, score(s, without).score_LE)
    assert (weighted.pack_mass_PLE[1] == 0).all()


def test_per_file_gives_every_pack_the_same_total() -> None:
    """Repeating one pack's tokens does not change what it counts, up to the common scale."""
    t = trace(12)
    index = np.concatenate([np.arange(T), np.flatnonzero(t.pack_T == 2)])
    routed = {
        name: getattr(t, name)[index]
        for name in ("experts_TLK", "weights_TLK", "norms_TLK", "pack_T", "row_T")
    }
    scores = TokenScores(*(getattr(t.scores, n)[index] for n in ("logp_T", "entropy_T", "block_T")))
    more = Trace(**{**vars(t), **routed, "scores": scores})
    s = pruning(weight="uniform", sampling="per_file")
    before, after = score(s, t).score_LE, score(s, more).score_LE
    np.testing.assert_allclose(after / len(more), before / len(t), rtol=1e-12)
    masses_P = score(s.model_copy(update={"saliency": "one"}), t).pack_mass_PLE.sum(axis=(1, 2))
    np.testing.assert_allclose(masses_P, masses_P[0])


def test_weights_that_leave_no_token_are_an_error() -> None:
    with pytest.raises(UserError, match=r"pack_weights.*a, b, c"):
        score(pruning(pack_weights={"a": 0, "b": 0, "c": 0}), trace(0))


@pytest.mark.parametrize("how", [{}, *SAMPLINGS])
def test_masses_of_packs_or_of_rows_give_the_score_of_any_weighting(how: Any) -> None:
    t = trace(13)
    by_pack, by_row = masses(pruning(), t), masses(pruning(), t, by="row")
    for weights in itertools.product((1.0, -1.0), (0.25, 0.0), (-2.0, 3.0)):
        named = dict(zip(("w_good", "w_uncertain", "w_conflict"), weights, strict=True))
        s = pruning(**named, **how)
        expected, again, summed = score(s, t), score_from(s, by_pack), score_from(s, by_row)
        for name in ("score_LE", "positive_mass_LE", "count_LE", "pack_mass_PLE"):
            value = getattr(expected, name)
            assert np.array_equal(getattr(again, name), value), name  # the same code: equal bits
            np.testing.assert_allclose(getattr(summed, name), value, rtol=1e-10, atol=1e-12)
    assert expected.pack_mass_PLE.shape == (3, LAYERS, EXPERTS)


def test_counting_a_row_twice_is_the_trace_with_that_row_twice() -> None:
    t = trace(14)
    by_row = masses(pruning(weight="uniform"), t, by="row")
    rows = np.unique(t.row_T)
    times = np.random.default_rng(0).integers(0, 3, len(rows))
    index = np.concatenate(
        [np.repeat(np.flatnonzero(t.row_T == r), n) for r, n in zip(rows, times, strict=True)]
    )
    routed = {
        name: getattr(t, name)[index]
        for name in ("experts_TLK", "weights_TLK", "norms_TLK", "pack_T", "row_T")
    }
    scores = TokenScores(*(getattr(t.scores, n)[index] for n in ("logp_T", "entropy_T", "block_T")))
    resampled = Trace(**{**vars(t), **routed, "scores": scores})
    for how in ({}, {"sampling": "per_file", "reduce": "mean"}):
        s = pruning(weight="uniform", **how)  # thresholds stay those of the whole trace
        mine, theirs = score_from(s, by_row, times), score(s, resampled)
        np.testing.assert_allclose(mine.score_LE, theirs.score_LE, rtol=1e-10)
        assert np.array_equal(mine.count_LE, theirs.count_LE)


@pytest.mark.parametrize("steps", [0, 2, 6])
def test_soft_regions_of_no_width_are_strict(steps: int) -> None:
    """Ties and tokens that sit on a threshold included, to the last bit."""
    for seed in range(5):
        t = trace(seed, tokens=41, steps=steps)
        for q in (0.15, 0.25, 0.5):  # at 0.25 and 0.5 a token is the threshold
            strict = score(pruning(quantile=q), t)
            soft = score(pruning(quantile=q, regions="soft", soft_width=1e-9), t)
            assert np.array_equal(soft.score_LE, strict.score_LE)
            assert np.array_equal(soft.positive_mass_LE, strict.positive_mass_LE)
            assert soft.region_tokens == strict.region_tokens


def test_soft_regions_are_gradual_and_know_ranks_only() -> None:
    t = trace(15, 300)
    p, h = t.scores.p_T, t.scores.entropy_T
    shares = soft_regions(p, h, 0.25, 0.05)
    np.testing.assert_allclose(shares.sum(axis=1), 1.0)
    assert ((shares > 0) & (shares < 1)).all()
    order = np.argsort(h)
    assert (np.diff(shares[order, 1]) > 0).all()  # the less sure, the more uncertain
    assert np.ptp(soft_regions(p, h, 0.25, 100.0), axis=0).max() < 0.01  # wide: all alike
    # any rising map of p and H leaves the quantile's token, so the shares, where they are
    n = 301  # a quantile of 0.25 is then a token's own value
    u = trace(16, n)
    p, h = u.scores.p_T, u.scores.entropy_T
    np.testing.assert_allclose(
        soft_regions(p**3, np.sqrt(h), 0.25, 0.05), soft_regions(p, h, 0.25, 0.05), rtol=1e-9
    )


def test_msan_is_the_mean_square() -> None:
    t = trace(17)
    result = score(pruning(saliency="norm2", weight="uniform", reduce="mean"), t).score_LE
    layer, expert = 1, 2
    chosen = t.norms_TLK[:, layer][t.experts_TLK[:, layer] == expert].astype(float)
    np.testing.assert_allclose(result[layer, expert], np.mean(chosen**2))


OTHERS: list[dict[str, Any]] = [
    {"quantile": 0.4}, {"high_quantile": 0.5}, {"regions": "policy"}, {"regions": "soft"},
    {"regions": "soft", "soft_width": 0.5}, {"saliency": "norm"}, {"saliency": "one"},
    {"weight": "uniform"}, {"w_good": 3.0}, {"w_conflict": 0.0}, {"reduce": "mean"},
    {"pack_weights": {"a": 2.0}}, {"sampling": "per_file"}, {"keep_n": 8}, {"core_pos_top_m": 0},
    {"seed": 5},
]  # fmt: skip


@pytest.mark.parametrize("changes", OTHERS, ids=str)
def test_masses_of_one_key_are_equal(changes: dict[str, Any]) -> None:
    """A search keeps masses under their key: another setting must not need others."""
    t, plain, changed = trace(18), pruning(), pruning(**changes)
    same = np.array_equal(masses(plain, t).mass_GRLE, masses(changed, t).mass_GRLE)
    assert (mass_key(plain) == mass_key(changed)) <= same
    searched = {"weight", "w_good", "w_conflict", "reduce", "pack_weights", "sampling", "keep_n"}
    if set(changes) <= searched:
        assert mass_key(plain) == mass_key(changed)
