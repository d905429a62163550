"""Bounds that hold as often as they say, and experts settled as a loop over pairs says."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from eaft_prune.maths.elimination import interim_blocks, ratio_bounds, settled, tail_of


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [(1, [1]), (3, [3]), (4, [4]), (6, [4, 6]), (16, [4, 8, 16]), (64, [8, 16, 32, 64])],
)
def test_interim_blocks_end_with_all_blocks_and_begin_with_four(
    blocks: int, expected: list[int]
) -> None:
    assert interim_blocks(blocks) == expected


@given(
    st.lists(
        st.lists(st.tuples(st.integers(-9, 9), st.integers(0, 4)), min_size=6, max_size=6),
        min_size=1,
        max_size=3,
    ),
    st.integers(1, 5),
)
def test_an_expert_is_settled_iff_a_loop_over_pairs_says_so(
    rows: list[list[tuple[int, int]]], keep_n: int
) -> None:
    low = np.array([[float(a) for a, _ in row] for row in rows])
    high = low + np.array([[float(w) for _, w in row] for row in rows])
    found = settled(low, high, keep_n)
    for layer, expert in np.ndindex(low.shape):
        beaten = sum(high[layer, j] < low[layer, expert] for j in range(6))
        beating = sum(low[layer, j] > high[layer, expert] for j in range(6))
        assert found[layer, expert] == (beaten >= 6 - keep_n or beating >= keep_n)


def test_bounds_are_those_of_the_ratio_estimate_written_out() -> None:
    rng = np.random.default_rng(0)
    change, tokens = rng.normal(1, 1, (1, 3, 5)), rng.integers(1, 9, 5)
    low, high = ratio_bounds(change, tokens, 20, 0.01)
    spread, middle = [], []
    for expert in range(3):
        ratio = sum(change[0, expert]) / sum(tokens)
        rest = [c - ratio * t for c, t in zip(change[0, expert], tokens, strict=True)]
        middle.append(ratio)
        spread.append(sum(r * r for r in rest) / 4)
    for expert in range(3):
        variance = max(spread[expert], sorted(spread)[1])  # none below the median
        error = math.sqrt(5 * variance * (1 - 5 / 20)) / sum(tokens)
        reach = float(stats.t.ppf(0.99, 4)) * error
        assert low[0, expert] == pytest.approx(middle[expert] - reach)
        assert high[0, expert] == pytest.approx(middle[expert] + reach)


@pytest.mark.parametrize("heavy", [False, True], ids=["normal", "rare experts"])
def test_the_chance_of_another_cut_is_the_one_promised(heavy: bool) -> None:
    """Worlds of 32 blocks, raced to a cut of 5 of 10; the truth is the cut by all blocks."""
    rng = np.random.default_rng(1)
    wrong = decided = 0
    for _ in range(300):
        change, tokens = world(rng, heavy)
        full = set(np.argsort(-change.sum(axis=2)[0])[:5].tolist())
        low, high = np.full((1, 10), -np.inf), np.full((1, 10), np.inf)
        is_open = np.ones((1, 10), bool)
        for n in interim_blocks(32)[:-1]:
            a, b = ratio_bounds(change[..., :n], tokens[:n], 32, tail_of(0.9, 10, 32))
            low[is_open] = np.maximum(low, a)[is_open]
            high[is_open] = np.minimum(high, b)[is_open]
            is_open &= ~settled(low, high, 5)
        above = (low[:, :, None] > high[:, None, :]).sum(axis=2)[0]
        closed = np.flatnonzero(~is_open[0])
        wrong += any((above[j] >= 5) != (j in full) for j in closed)
        decided += len(closed)
    assert wrong <= 30  # 10% of 300
    assert decided >= 300  # and it is of use


def world(rng: Any, heavy: bool) -> tuple[Any, Any]:
    tokens = rng.integers(50, 200, 32)
    change = rng.normal(np.arange(10)[:, None], 3.0, (10, 32)) * tokens
    if heavy:  # some matter to one block in eight alone
        rare = rng.random((10, 32)) < 0.125
        change = np.where((np.arange(10) % 2 == 0)[:, None], change * rare * 8, change)
    return change[None], tokens
