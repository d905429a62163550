"""Grouped least squares against numpy on the dense matrix."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eaft_prune.repair.least_squares import (
    Features,
    factors,
    mean_square,
    regularised,
    solve,
    squares,
)

GROUPS, WIDTH, OUT = 5, 4, 3


def features(seed: int, tokens: int, width: int = WIDTH, groups: int = GROUPS) -> Features:
    """Two groups a token; the last group is never chosen."""
    rng = np.random.default_rng(seed)
    chosen = np.argsort(rng.random((tokens, groups - 1)), axis=1)[:, :2]
    rows = [np.nonzero((chosen == group).any(1))[0] for group in range(groups)]
    values = [rng.normal(0, 1 + i % 5, (len(own), width)) for i, own in enumerate(rows)]
    return Features(
        tokens, tuple(map(torch.from_numpy, rows)), tuple(map(torch.from_numpy, values))
    )


def dense(given: Features) -> np.ndarray:
    """F, filled in one number at a time."""
    out = np.zeros((given.tokens, len(given.values), given.columns))
    for group, (rows, values) in enumerate(zip(given.rows, given.values, strict=True)):
        for row, value in zip(rows.tolist(), values.numpy(), strict=True):
            out[row, group] = value
    return out.reshape(given.tokens, -1)


def by_numpy(given: Features, target: torch.Tensor, penalty: float) -> np.ndarray:
    """Rows sqrt(penalty) e_u under F, zeros under D; lstsq gives 0 where a column is 0."""
    f = dense(given)
    below = np.sqrt(penalty) * np.eye(f.shape[1])
    stacked = np.vstack([f, below]), np.vstack([target.numpy(), np.zeros((f.shape[1], OUT))])
    found = np.linalg.lstsq(*stacked, rcond=None)[0]
    return found.reshape(len(given.values), given.columns, OUT)


def targets(seed: int, tokens: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(0, 1, (tokens, OUT)))


@given(st.integers(0, 1000), st.sampled_from([10, 60]), st.sampled_from([0.01, 0.3]))
def test_the_joint_solution_is_numpys_least_squares(seed: int, tokens: int, ridge: float) -> None:
    given_, target = features(seed, tokens), targets(seed, tokens)
    penalty = ridge * mean_square(given_.grams())
    assert penalty == pytest.approx(ridge * (dense(given_) ** 2).sum(0).mean())
    want = torch.from_numpy(by_numpy(given_, target, penalty))
    found = solve(given_, target, penalty, given_.grams())
    exact = solve(given_, target, penalty, given_.grams(), tolerance=1e-12)
    assert found is not None
    assert exact is not None
    objectives = [
        float((target - given_.product(x)).square().sum() + penalty * x.square().sum())
        for x in (want, exact, found, torch.zeros_like(want))
    ]
    assert objectives == sorted(objectives) or objectives[1] == pytest.approx(objectives[0])
    # with fewer tokens than unknowns the valley is flat
    slack = 1.001 if tokens == 60 else 1.05
    assert objectives[2] <= slack * objectives[0]
    assert objectives[2] <= objectives[3]
    np.testing.assert_allclose(exact, want, atol=1e-4 * float(want.abs().max()))


def test_single_precision_is_near_float64_where_columns_are_correlated() -> None:
    """Features that share a large mean, as activations do."""
    given_ = features(5, 4000, width=33)
    given_ = Features(given_.tokens, given_.rows, tuple(3 + v for v in given_.values))
    target = targets(6, 4000)
    penalty = 0.003 * mean_square(given_.grams())
    exact = torch.from_numpy(by_numpy(given_, target, penalty))
    single = Features(given_.tokens, given_.rows, tuple(v.float() for v in given_.values))
    found = solve(single, target.float(), penalty, single.grams())
    assert found is not None
    assert found.dtype == torch.float32
    wanted = given_.product(exact)
    assert (given_.product(found.double()) - wanted).norm() < 5e-3 * wanted.norm()


def test_thousands_of_groups_need_no_matrix_between_them() -> None:
    """A full Gram matrix of these would have 1.1e9 numbers."""
    given_ = features(0, 3000, width=4, groups=8192)
    target = targets(1, 3000)
    penalty = 0.1 * mean_square(given_.grams())
    found = solve(given_, target, penalty, given_.grams())
    assert found is not None
    rest = target - given_.product(found)
    pull = given_.pulled(rest) - penalty * found  # half the objective's negative gradient
    assert pull.norm() < 0.01 * given_.pulled(target).norm()


@pytest.mark.parametrize("width", [1, WIDTH])
def test_products_and_gram_blocks_are_those_of_the_dense_matrix(width: int) -> None:
    given_ = features(0, 40, width)
    f, target = dense(given_), targets(2, 40)
    x = torch.from_numpy(np.random.default_rng(1).normal(0, 1, (GROUPS, width, OUT)))
    np.testing.assert_allclose(given_.product(x), f @ x.reshape(-1, OUT).numpy(), atol=1e-12)
    np.testing.assert_allclose(given_.pulled(target).reshape(-1, OUT), f.T @ target.numpy())
    whole = (f.T @ f).reshape(GROUPS, width, GROUPS, width)
    for group, own in enumerate(given_.grams()):
        np.testing.assert_allclose(own, whole[group, :, group], atol=1e-10)


def test_a_part_of_the_tokens_is_those_rows_of_the_matrix() -> None:
    given_ = features(3, 30)
    chosen = torch.from_numpy(np.random.default_rng(4).random(30) < 0.5)
    np.testing.assert_array_equal(dense(given_.of(chosen)), dense(given_)[chosen.numpy()])


def test_a_matrix_that_rounding_makes_indefinite_is_factorised_with_a_little_more() -> None:
    """The largest eigenvalue is 2e6 times the most that is added; what is definite is exact."""
    columns = torch.ones(3, 2, dtype=torch.float64)
    bad, good = columns @ columns.T - 1e-9 * torch.eye(3), 2 * torch.eye(3, dtype=torch.float64)
    assert torch.linalg.cholesky_ex(bad)[1] != 0
    found = factors(torch.stack([bad.double(), good]))
    assert found is not None
    torch.testing.assert_close(found[0] @ found[0].T, bad, atol=1e-5, rtol=0)
    torch.testing.assert_close(found[1] @ found[1].T, good, atol=0, rtol=1e-15)


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_numbers_that_are_not_finite_have_no_solution(number: float) -> None:
    given_ = features(0, 30)
    given_.values[1][0, 0] = number
    assert solve(given_, targets(0, 30), 0.1, given_.grams()) is None


def test_no_columns_at_all_are_solved_by_nothing() -> None:
    given_ = features(0, 20)
    zeros = Features(given_.tokens, given_.rows, tuple(0 * v for v in given_.values))
    assert mean_square(zeros.grams()) == 0
    torch.testing.assert_close(
        regularised(zeros.grams(), 0.0)[0], torch.eye(WIDTH, dtype=torch.float64)
    )
    found = solve(zeros, targets(0, 20), 0.0, zeros.grams())
    assert found is not None
    assert not found.any()


def test_squares_are_summed_exactly_enough() -> None:
    """float32 sums would lose the ones beside 2^24."""
    rest = torch.ones(20000, 2)
    rest[0, 0] = 4096.0
    assert squares(rest) == 2**24 + 39999
