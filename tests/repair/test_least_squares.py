"""Grouped least squares against numpy on the dense matrix."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eaft_prune.core.types import UserError
from eaft_prune.repair.least_squares import Features, gauss_seidel, gram, product, solve

GROUPS, WIDTH, OUT = 5, 4, 3


def features(seed: int, tokens: int, width: int = WIDTH) -> Features:
    """Two groups a token; the last group is never chosen."""
    rng = np.random.default_rng(seed)
    chosen = np.argsort(rng.random((tokens, GROUPS - 1)), axis=1)[:, :2]
    rows = [np.nonzero((chosen == group).any(1))[0] for group in range(GROUPS)]
    values = [rng.normal(0, 1 + i, (len(own), width)) for i, own in enumerate(rows)]
    return Features(
        tokens, tuple(map(torch.from_numpy, rows)), tuple(map(torch.from_numpy, values))
    )


def dense(given: Features) -> np.ndarray:
    """F, filled in column by column: leading columns of every group, then the last ones."""
    groups, width = len(given.values), given.values[0].shape[1]
    out = np.zeros((given.tokens, groups * width))
    for group, (rows, values) in enumerate(zip(given.rows, given.values, strict=True)):
        for row, value in zip(rows.tolist(), values.numpy(), strict=True):
            for column in range(width - 1):
                out[row, group * (width - 1) + column] = value[column]
            out[row, groups * (width - 1) + group] = value[-1]
    return out


def by_numpy(given: Features, target: torch.Tensor, ridge: float) -> np.ndarray:
    """Rows sqrt(ridge m) e_u under F, zeros under D; lstsq gives 0 where a column is 0."""
    f = dense(given)
    weights = np.full(f.shape[1], np.sqrt(ridge * (f**2).sum(0).mean()))
    below = np.zeros((f.shape[1], target.shape[1]))
    stacked = np.vstack([f, np.diag(weights)]), np.vstack([target.numpy(), below])
    return np.linalg.lstsq(*stacked, rcond=None)[0]


@given(st.integers(0, 1000), st.sampled_from([10, 60]), st.sampled_from([0.01, 0.3]))
def test_both_solvers_are_numpys_least_squares(seed: int, tokens: int, ridge: float) -> None:
    given_ = features(seed, tokens)
    target = torch.from_numpy(np.random.default_rng(seed).normal(0, 1, (tokens, OUT)))
    want = by_numpy(given_, target, ridge)
    penalty = ridge * given_.mean_square
    exact = solve(*gram(given_, target, torch.float64), penalty)
    np.testing.assert_allclose(exact.numpy(), want, rtol=1e-7, atol=1e-9)
    swept = gauss_seidel(given_, target, penalty, torch.float64)
    objectives = [
        float((target - product(given_, x)).square().sum() + penalty * x.square().sum())
        for x in (exact, swept, torch.zeros_like(exact))
    ]
    # with fewer tokens than unknowns the sweeps creep along a flat valley: 1.040 at worst
    slack = 1.01 if tokens == 60 else 1.05
    assert objectives[0] - 1e-9 <= objectives[1] <= slack * objectives[0]
    assert objectives[1] <= objectives[2]
    if tokens == 60:
        np.testing.assert_allclose(swept.numpy(), want, rtol=0, atol=2e-3 * np.abs(want).max())


def test_single_precision_is_near_float64_where_columns_are_correlated() -> None:
    """Features that share a large mean, as activations do."""
    given_ = features(5, 4000, width=33)
    given_ = Features(given_.tokens, given_.rows, tuple(3 + v for v in given_.values))
    target = torch.from_numpy(np.random.default_rng(6).normal(0, 1, (4000, OUT)))
    penalty = 0.003 * given_.mean_square
    exact = solve(*gram(given_, target, torch.float64), penalty)
    single = Features(given_.tokens, given_.rows, tuple(v.float() for v in given_.values))
    for x in (
        solve(*gram(single, target.float(), torch.float32), penalty),
        gauss_seidel(single, target.float(), penalty, torch.float32),
    ):
        fitted, wanted = product(given_, x.double()), product(given_, exact)
        assert (fitted - wanted).norm() < 1e-3 * wanted.norm()


def test_a_gram_matrix_that_rounding_makes_indefinite_is_an_error() -> None:
    twice = torch.ones(8, 2, dtype=torch.float64)
    given_ = Features(8, (torch.arange(8),), (twice,))
    with pytest.raises(UserError, match=r"compensation\.ridge is too small"):
        solve(*gram(given_, torch.ones(8, 1, dtype=torch.float64), torch.float64), -1e-9)


@pytest.mark.parametrize("width", [1, WIDTH])
def test_product_and_gram_are_those_of_the_dense_matrix(width: int) -> None:
    given_ = features(0, 40, width)
    f = dense(given_)
    x = torch.from_numpy(np.random.default_rng(1).normal(0, 1, (f.shape[1], OUT)))
    np.testing.assert_allclose(product(given_, x), f @ x.numpy(), atol=1e-12)
    target = torch.from_numpy(np.random.default_rng(2).normal(0, 1, (40, OUT)))
    squares, right = gram(given_, target, torch.float64)
    np.testing.assert_allclose(squares, f.T @ f, atol=1e-10)
    np.testing.assert_allclose(right, f.T @ target.numpy(), atol=1e-10)


def test_a_part_of_the_tokens_is_those_rows_of_the_matrix() -> None:
    given_ = features(3, 30)
    chosen = torch.from_numpy(np.random.default_rng(4).random(30) < 0.5)
    np.testing.assert_array_equal(dense(given_.of(chosen)), dense(given_)[chosen.numpy()])
