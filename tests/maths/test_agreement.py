"""Agreement of rankings and plans, against counted ranks and set arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eaft_prune.core.types import KeepPlan
from eaft_prune.maths.agreement import jaccard, spearman


def ranks(values: np.ndarray) -> list[float]:
    """Of ties their mean: smaller ones, and half of the others that are equal."""
    return [np.sum(values < v) + (np.sum(values == v) - 1) / 2 for v in values]


@given(st.integers(0, 10**6), st.integers(2, 12), st.sampled_from([2, 4, 100]))
def test_spearman_is_pearsons_of_mean_ranks(seed: int, experts: int, values: int) -> None:
    rng = np.random.default_rng(seed)
    one, other = rng.integers(0, values, (2, 3, experts)).astype(float)
    for a, b, found in zip(one, other, spearman(one, other), strict=True):
        if np.ptp(a) and np.ptp(b):
            assert found == pytest.approx(np.corrcoef(ranks(a), ranks(b))[0, 1])


def test_spearman_knows_order_only_and_says_so_where_there_is_none() -> None:
    a = np.array([[1.0, 2, 3, 4]])
    assert spearman(a, np.exp(a)) == pytest.approx([1])
    assert spearman(a, -a) == pytest.approx([-1])
    flat = np.ones((1, 4))
    assert spearman(flat, 7 * flat).tolist() == [1]
    assert spearman(flat, a).tolist() == [0]


def test_jaccard_is_shared_over_all_of_each_layer() -> None:
    one = KeepPlan(((0, 1, 2), (0, 1), (3,)), 4)
    other = KeepPlan(((0, 1, 3), (0, 1), (0, 1)), 4)
    assert jaccard(one, other).tolist() == [2 / 4, 1, 0]
    assert jaccard(one, one).tolist() == [1, 1, 1]
