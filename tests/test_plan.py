"""A keep plan is the core, then the best of the rest; ties go to the lower id."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eaft_prune.config import PruningSettings
from eaft_prune.stages.plan import check_keep_n, plan
from eaft_prune.types import ExpertScores, KeepPlan, UserError


def pruning(**changes: Any) -> PruningSettings:
    values: dict[str, Any] = {
        "name": "x", "keep_n": 4, "saliency": "gate_norm", "weight": "eaft", "reduce": "sum",
        "core_pos_top_m": 0, "core_count_top_m": 0, "keep_multiple": 1,
    }  # fmt: skip
    return PruningSettings(**{**values, **changes})


def evidence(score: Any, positive: Any = None, count: Any = None) -> ExpertScores:
    score = np.array(score, float)
    return ExpertScores(
        score,
        np.zeros_like(score) if positive is None else np.array(positive, float),
        np.zeros(score.shape, np.int64) if count is None else np.array(count, np.int64),
        {"good": 1, "uncertain": 0, "conflict": 0},
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
