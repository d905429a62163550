"""Rounding with feedback against a loop over rows that hands every error on at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from eaft_prune.checkpoints.formats import MXFP4
from eaft_prune.repair.rounding import with_feedback

EXPERTS, ROUNDED, OUT = 3, 96, 7


def problem(seed: int, biases: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    size = ROUNDED + biases
    weights = rng.normal(0, 0.02, (EXPERTS, size, OUT))
    columns = rng.normal(0, 1, (EXPERTS, 300, size)) + rng.normal(0, 1, (EXPERTS, 300, 1))
    metric = np.einsum("ktu,ktv->kuv", columns, columns)
    return torch.from_numpy(weights), torch.from_numpy(metric)


def handed(weights: np.ndarray, metric: np.ndarray, rows: int) -> np.ndarray:
    """One expert, float64: the inverse of what is not rounded yet is made anew for every row."""
    assert MXFP4.grid is not None
    group = MXFP4.grid.group
    out = weights.copy()
    for row in range(rows):
        if row % group == 0:
            scales = MXFP4.grid.scales(torch.from_numpy(out[row : row + group].T.copy()))
        inverse = np.linalg.inv(metric[row:, row:])
        value = MXFP4.grid.nearest(torch.from_numpy(out[row][:, None]), scales[:, None])[:, 0]
        error = (out[row] - value.numpy()) / inverse[0, 0]
        out[row:] -= np.outer(inverse[:, 0], error)
        out[row] = value
    return out


def settled(rounded: np.ndarray, weights: np.ndarray, metric: np.ndarray) -> np.ndarray:
    """One expert: every row in turn where the error is least, all others as they are."""
    assert MXFP4.grid is not None
    out, group = rounded.copy(), MXFP4.grid.group
    first_time = [
        MXFP4.grid.scales(torch.from_numpy(handed(weights, metric, at)[at : at + group].T.copy()))
        for at in range(0, ROUNDED, group)
    ]
    for row in range(len(out)):
        others = metric[row] @ (out - weights) - metric[row, row] * (out[row] - weights[row])
        best = weights[row] - others / metric[row, row]
        if row < ROUNDED:
            scales = first_time[row // group][:, None]
            best = MXFP4.grid.nearest(torch.from_numpy(best[:, None]), scales)[:, 0].numpy()
        out[row] = best
    return out


def naive(weights: np.ndarray, metric: np.ndarray) -> np.ndarray:
    return settled(handed(weights, metric, ROUNDED), weights, metric)


def lost(rounded: np.ndarray, weights: np.ndarray, metric: np.ndarray) -> float:
    away = rounded - weights
    return float((away * (metric @ away)).sum())


@pytest.mark.parametrize("biases", [0, 1])
def test_all_experts_at_once_are_each_row_by_row(biases: int) -> None:
    assert MXFP4.grid is not None
    weights, metric = problem(0, biases)
    found = with_feedback(weights, metric, ROUNDED, MXFP4.grid)
    for own, loss, rounded in zip(weights.numpy(), metric.numpy(), found, strict=True):
        np.testing.assert_allclose(rounded, naive(own, loss), atol=1e-9)
        once = lost(handed(own, loss, ROUNDED), own, loss)
        assert lost(rounded.numpy(), own, loss) < once
    stored = MXFP4.decode(MXFP4.encode(found[:, :ROUNDED].float()))
    torch.testing.assert_close(stored, found[:, :ROUNDED].float(), rtol=0, atol=0)


def test_the_metric_loses_less_than_by_nearest_and_float32_as_float64() -> None:
    assert MXFP4.grid is not None
    weights, metric = problem(1, 1)

    def all_lost(rounded: torch.Tensor) -> float:
        parts = zip(rounded.double().numpy(), weights.numpy(), metric.numpy(), strict=True)
        return sum(lost(*part) for part in parts)

    nearest = weights.clone()
    nearest[:, :ROUNDED] = MXFP4.decode(MXFP4.encode(weights[:, :ROUNDED].float())).double()
    double = all_lost(with_feedback(weights, metric, ROUNDED, MXFP4.grid))
    single = all_lost(with_feedback(weights.float(), metric, ROUNDED, MXFP4.grid))
    assert double < 0.5 * all_lost(nearest)
    assert single == pytest.approx(double, rel=0.05)


def test_without_a_metric_rows_are_rounded_one_by_one() -> None:
    assert MXFP4.grid is not None
    weights, metric = problem(2, 1)
    found = with_feedback(weights.float(), metric * torch.nan, ROUNDED, MXFP4.grid)
    stored = MXFP4.decode(MXFP4.encode(weights[:, :ROUNDED].float()))
    torch.testing.assert_close(found[:, :ROUNDED], stored, rtol=0, atol=0)
    torch.testing.assert_close(found[:, ROUNDED:], weights[:, ROUNDED:].float())
