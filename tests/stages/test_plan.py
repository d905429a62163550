"""A keep plan is the core, then the best of the rest; ties go to the lower id."""

from __future__ import annotations

import itertools
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eaft_prune.config import PruningSettings
from eaft_prune.core.types import ExpertScores, KeepPlan, UserError
from eaft_prune.maths.allocation import allocate, effective_number
from eaft_prune.stages.plan import check_keep_n, plan


def pruning(**changes: Any) -> PruningSettings:
    values: dict[str, Any] = {
        "name": "x", "keep_n": 4, "saliency": "gate_norm", "weight": "eaft", "reduce": "sum",
        "core_pos_top_m": 0, "core_count_top_m": 0, "keep_multiple": 1,
    }  # fmt: skip
    return PruningSettings(**{**values, **changes})


def evidence(
    score: Any, positive: Any = None, count: Any = None, packs: Any = None
) -> ExpertScores:
    """`packs`: positive mass by pack; else all of it is of one pack."""
    score = np.array(score, float)
    mass = np.zeros_like(score) if positive is None else np.array(positive, float)
    if packs is not None:
        mass = np.array(packs, float).sum(axis=0)
    return ExpertScores(
        score,
        mass,
        np.zeros(score.shape, np.int64) if count is None else np.array(count, np.int64),
        {"good": 1, "uncertain": 0, "conflict": 0},
        mass[None] if packs is None else np.array(packs, float),
    )


def best(values: list[float], m: int, among: set[int]) -> list[int]:
    """The m largest, one at a time; of equal ones the lowest id."""
    chosen: list[int] = []
    left = set(among)
    while left and len(chosen) < m:
        top = min(i for i in left if values[i] == max(values[j] for j in left))
        chosen.append(top)
        left.remove(top)
    return chosen


def naive(s: PruningSettings, e: ExpertScores) -> list[list[int]] | None:
    """Kept ids per layer, or None where the core does not fit."""
    layers = []
    for score, positive, count in zip(
        e.score_LE.tolist(), e.positive_mass_LE.tolist(), e.count_LE.tolist(), strict=True
    ):
        everyone = set(range(len(score)))
        core = {*best(positive, s.core_pos_top_m, {i for i in everyone if positive[i] > 0})}
        core |= {*best(count, s.core_count_top_m, {i for i in everyone if count[i] > 0})}
        if len(core) > s.keep_n:
            return None
        rest = best(score, s.keep_n - len(core), everyone - core)
        layers.append(sorted([*core, *rest]))
    return layers


FEW = st.integers(-2, 3).map(float)  # few values: many ties


@st.composite
def cases(draw: Any) -> tuple[PruningSettings, ExpertScores]:
    experts, layers = draw(st.integers(1, 9)), draw(st.integers(1, 3))

    def table(values: Any) -> Any:
        row = st.lists(values, min_size=experts, max_size=experts)
        return draw(st.lists(row, min_size=layers, max_size=layers))

    count = table(st.integers(0, 3))
    found = evidence(table(FEW), table(FEW.map(abs)), count)
    return (
        pruning(
            keep_n=draw(st.integers(1, experts)),
            core_pos_top_m=draw(st.integers(0, 4)),
            core_count_top_m=draw(st.integers(0, 3)),
        ),
        found,
    )


@given(cases())
def test_the_plan_is_the_naive_one(case: tuple[PruningSettings, ExpertScores]) -> None:
    s, e = case
    expected = naive(s, e)
    if expected is None:
        with pytest.raises(UserError, match="core experts"):
            plan(s, e)
        return
    made = plan(s, e)
    assert [list(ids) for ids in made.kept] == expected
    assert made.uniform_keep_n == s.keep_n
    assert made.n_experts == e.score_LE.shape[1]


def test_ties_go_to_the_lower_id() -> None:
    assert plan(pruning(keep_n=3), evidence([[1, 0, 1, 1, 1]])).kept == ((0, 2, 3),)
    assert plan(pruning(keep_n=2), evidence([[0.0, -0.0, 0, 0]])).kept == ((0, 1),)


def test_core_experts_are_inside_whatever_their_score() -> None:
    score = [[9, 8, 7, 6, -5, -6]]
    positive, count = [[0, 0, 0, 0, 3, 1]], [[1, 1, 1, 1, 1, 9]]
    e = evidence(score, positive, count)
    assert plan(pruning(keep_n=3), e).kept == ((0, 1, 2),)
    assert plan(pruning(keep_n=3, core_pos_top_m=1), e).kept == ((0, 1, 4),)
    assert plan(pruning(keep_n=3, core_count_top_m=1), e).kept == ((0, 1, 5),)
    assert plan(pruning(keep_n=3, core_pos_top_m=1, core_count_top_m=1), e).kept == ((0, 4, 5),)
    assert plan(pruning(keep_n=3, core_pos_top_m=2, core_count_top_m=1), e).kept == ((0, 4, 5),)


def test_experts_without_evidence_are_no_core() -> None:
    e = evidence([[3, 2, 1, 0]], [[0, 0, 0, 1]])
    assert plan(pruning(keep_n=2, core_pos_top_m=4), e).kept == ((0, 3),)


def test_a_core_that_does_not_fit_is_named() -> None:
    e = evidence([[0] * 6] * 2, [[0] * 6, [1] * 6])
    with pytest.raises(UserError, match=r"layer 1 has 4 core experts.*pruning\.keep_n = 3"):
        plan(pruning(keep_n=3, core_pos_top_m=4), e)


@given(st.integers(1, 8), st.integers(0, 99))
def test_keeping_every_expert_keeps_all(experts: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    e = evidence(rng.normal(size=(2, experts)), rng.random((2, experts)))
    made = plan(pruning(keep_n=experts, core_pos_top_m=2), e)
    assert made.keeps_all
    assert made.kept == (tuple(range(experts)),) * 2


@given(cases())
def test_keeping_more_keeps_what_was_kept(case: tuple[PruningSettings, ExpertScores]) -> None:
    s, e = case
    experts = e.score_LE.shape[1]
    if naive(s, e) is None or s.keep_n == experts:
        return
    few = plan(s, e)
    more = plan(s.model_copy(update={"keep_n": s.keep_n + 1}), e)
    assert all(set(a) < set(b) for a, b in zip(few.kept, more.kept, strict=True))
    assert not few.keeps_all


@pytest.mark.parametrize("keep_n", [4, 16, 32])
def test_keep_n_from_top_k_to_all_is_fine(keep_n: int) -> None:
    check_keep_n(pruning(keep_n=keep_n), n_experts=32, top_k=4)


@pytest.mark.parametrize("keep_n", [1, 3, 33, 64])
def test_keep_n_below_top_k_or_above_all_is_named(keep_n: int) -> None:
    with pytest.raises(UserError, match=rf"pruning\.keep_n = {keep_n}.*4\.\.32"):
        check_keep_n(pruning(keep_n=keep_n), n_experts=32, top_k=4)


@pytest.mark.parametrize("ids", [(), (1, 0), (0, 0), (-1, 0), (0, 8)])
def test_a_plan_of_impossible_ids_is_refused(ids: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match="layer 1"):
        KeepPlan(((0, 1), ids), 8)


def test_a_plan_knows_whether_it_is_uniform_and_whole() -> None:
    ragged = KeepPlan(((0, 1), (0, 1, 2)), 3)
    assert ragged.uniform_keep_n is None
    assert not ragged.keeps_all
    assert KeepPlan(((0, 1, 2),) * 2, 3).keeps_all
    assert KeepPlan(((0, 1, 2),) * 2, 3).uniform_keep_n == 3


def test_plan_digests_tell_plans_apart() -> None:
    plans = [
        KeepPlan(((0, 1), (0, 1)), 4),
        KeepPlan(((0, 1), (0, 2)), 4),
        KeepPlan(((0, 2), (0, 1)), 4),
        KeepPlan(((0, 1), (0, 1)), 5),
        KeepPlan(((0, 1),), 4),
    ]
    assert len({p.digest for p in plans}) == len(plans)
    assert KeepPlan(((0, 1), (0, 1)), 4).digest == plans[0].digest


def test_a_plan_says_its_size() -> None:
    assert KeepPlan(((0, 1), (0, 1)), 4).size == "2"
    assert KeepPlan(((0, 1), (0, 1, 2), (0, 1)), 4).size == "2to3"
    assert KeepPlan(((0, 1), (0, 1, 2)), 4).mean_keep_n == 2.5


def test_each_packs_floor_is_inside_whatever_the_score() -> None:
    """Expert 5 matters to a small pack only: no mass over all tokens would keep it."""
    packs = [[[50, 40, 30, 20, 10, 0]], [[0, 0, 0, 0, 1, 2]]]
    e = evidence([[9, 8, 7, 6, 5, 4]], packs=packs)
    assert plan(pruning(keep_n=3, core_pos_top_m=1), e).kept == ((0, 1, 2),)
    assert plan(pruning(keep_n=3, pack_floor_top_m=1), e).kept == ((0, 1, 5),)
    assert plan(pruning(keep_n=4, pack_floor_top_m=2), e).kept == ((0, 1, 4, 5),)
    assert plan(pruning(keep_n=5, pack_floor_top_m=4), evidence([[1] * 6], packs=[[[0] * 6]])).kept
    with pytest.raises(UserError, match=r"4 core experts.*pack_floor_top_m"):
        plan(pruning(keep_n=3, pack_floor_top_m=2), e)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=8))
def test_the_effective_number_is_inverse_simpson(masses: list[float]) -> None:
    found = float(effective_number(np.array([masses]))[0])
    total = sum(masses)
    shares = [m / total for m in masses] if total > 1e-100 else []
    simpson = sum(share**2 for share in shares)
    if shares:
        assert found == pytest.approx(1 / simpson)
        assert 1 - 1e-9 <= found <= len(masses) + 1e-9
    else:
        assert 1 - 1e-9 <= found <= len(masses) + 1e-9


def test_the_effective_number_of_equal_experts_is_their_number() -> None:
    masses = np.array([[1.0, 1, 1, 1], [3, 3, 0, 0], [5, 0, 0, 0], [0, 0, 0, 0]])
    assert effective_number(masses).tolist() == [4, 2, 1, 1]


@st.composite
def budgets(draw: Any) -> tuple[list[float], int, int, int, int]:
    layers, multiple = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    low = draw(st.integers(1, 4))
    high = draw(st.integers(low, 9))
    total = draw(st.integers(layers * low, layers * high))
    demand = draw(
        st.lists(st.sampled_from([0.5, 1.0, 1.5, 2.0, 7.0, 30.0]), min_size=layers, max_size=layers)
    )
    return demand, total * multiple, low * multiple, high * multiple, multiple


@given(budgets())
def test_the_budget_is_shared_out_exactly_by_largest_remainder(
    case: tuple[list[float], int, int, int, int],
) -> None:
    demand, total, low, high, multiple = case
    found = allocate(np.array(demand), total, low, high, multiple)
    assert sum(found) == total
    assert all(low <= n <= high and n % multiple == 0 for n in found)
    # the exact quotas, in fractions: layers join their bound until the rest is in proportion
    units = [Fraction(n, multiple) for n in (total, low, high)]
    quota = exact_quotas([Fraction(d) for d in demand], *units)
    assert sum(quota) == units[0]
    assert all(q - 1 < Fraction(n, multiple) < q + 1 for n, q in zip(found, quota, strict=True))
    up = [
        (q % 1, -i) for i, (n, q) in enumerate(zip(found, quota, strict=True)) if n > q * multiple
    ]
    down = [
        (q % 1, -i) for i, (n, q) in enumerate(zip(found, quota, strict=True)) if n < q * multiple
    ]
    assert not up or not down or min(up) > max(down)


def exact_quotas(
    demand: list[Fraction], total: Fraction, low: Fraction, high: Fraction
) -> list[Fraction]:
    """clip(c d, low, high) with sum `total`, which is piecewise linear in c."""

    def clip(c: Fraction) -> list[Fraction]:
        return [min(max(c * d, low), high) for d in demand]

    knots = sorted({bound / d for bound in (low, high) for d in demand})
    if sum(clip(knots[0])) >= total:
        return clip(knots[0])
    for a, b in itertools.pairwise(knots):
        at_a, at_b = sum(clip(a)), sum(clip(b))
        if at_a <= total <= at_b:
            share = (total - at_a) / (at_b - at_a) if at_b > at_a else Fraction(0)
            return clip(a + share * (b - a))
    return clip(knots[-1])


def test_a_layer_that_needs_more_experts_gets_more() -> None:
    rng = np.random.default_rng(0)
    even, peaked = np.ones(16), np.array([100.0] * 3 + [0.01] * 13)
    e = evidence(rng.random((2, 16)), [even, peaked])
    s = pruning(keep_n=8, selection="effective_number", keep_multiple=4)
    made = plan(s, e)
    assert [len(ids) for ids in made.kept] == [12, 4]
    assert made.mean_keep_n == 8
    assert made.uniform_keep_n is None
    bounded = s.model_copy(update={"min_keep_n": 6, "max_keep_n": 11})  # multiples of 4: 8 and 8
    assert [len(ids) for ids in plan(bounded, e).kept] == [8, 8]
    ranked = np.argsort(-e.score_LE[0])[:12]
    assert made.kept[0] == tuple(sorted(ranked.tolist()))


@given(
    st.integers(0, 10**6),
    st.integers(1, 3),
    st.sampled_from([0.3, 0.5, 0.9, 1.0]),
    st.integers(3, 8),
    st.sampled_from([1, 2, 3]),
)
def test_coverage_is_the_union_of_the_fewest_of_each_pack(
    seed: int, n_packs: int, share: float, cap: int, multiple: int
) -> None:
    rng = np.random.default_rng(seed)
    packs = rng.integers(0, 5, (n_packs, 2, 8))
    e = evidence(rng.random((2, 8)), packs=packs)
    cap = cap // multiple * multiple
    s = pruning(
        keep_n=cap, selection="coverage", coverage=share, keep_multiple=multiple, core_pos_top_m=1
    )
    made = plan(s, e)
    for layer, ids in enumerate(made.kept):
        union: set[int] = set()
        for mass in packs[:, layer].tolist():
            # every subset size, the heaviest first: the first that holds the share
            order = sorted(range(8), key=lambda j, mass=mass: (-mass[j], j))
            sizes = [n for n in range(9) if sum(mass[j] for j in order[:n]) >= share * sum(mass)]
            union |= set(order[: sizes[0]])
        core = set(best(packs.sum(axis=0)[layer].tolist(), 1, set(range(8))))
        if packs.sum(axis=0)[layer].max() == 0:
            core = set()
        wanted = -(-max(len(union | core), 1) // multiple) * multiple
        assert len(ids) == min(max(wanted, multiple), cap)
        assert core <= set(ids)
        if len(union | core) <= cap:
            assert union <= set(ids)
        else:
            assert set(ids) <= union | core
            left_out = [e.score_LE[layer, j] for j in union - set(ids)]
            taken = [e.score_LE[layer, j] for j in set(ids) - core]
            assert not taken or min(taken) > max(left_out)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"selection": "effective_number", "min_keep_n": 2}, r"min_keep_n = 2.*4\.\.16"),
        ({"selection": "coverage", "min_keep_n": 20}, r"min_keep_n = 20.*4\.\.16"),
        ({"selection": "effective_number", "max_keep_n": 12}, r"max_keep_n = 12.*16\.\.32"),
        ({"selection": "effective_number", "max_keep_n": 36}, r"max_keep_n = 36.*16\.\.32"),
    ],
)
def test_bounds_a_model_cannot_meet_are_named(changes: dict[str, Any], said: str) -> None:
    settings = pruning(keep_n=16, **{"min_keep_n": 4, **changes})
    with pytest.raises(UserError, match=said):
        check_keep_n(settings, n_experts=32, top_k=4)


def test_bounds_without_effect_are_refused() -> None:
    for changes, said in (
        ({"min_keep_n": 4}, "min_keep_n = 4 has no effect"),
        ({"max_keep_n": 4}, "max_keep_n = 4 has no effect"),
        ({"max_keep_n": 4, "selection": "coverage"}, "max_keep_n = 4 has no effect"),
        ({"sampling": "per_file", "pack_weights": {"a": 2}}, "has no effect"),
    ):
        with pytest.raises(ValueError, match=said):
            pruning(**changes)
