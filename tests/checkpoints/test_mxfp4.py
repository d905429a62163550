"""MXFP4: rounding against a naive loop and transformers, and what error feedback must not lose."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eaft_prune.checkpoints.formats import MXFP4
from eaft_prune.checkpoints.formats.e2m1 import dequantize, nearest, quantize
from eaft_prune.repair.rounding import with_feedback

GRID = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def values_of(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return dequantize(blocks, scales, torch.empty(*scales.shape[:-1], scales.shape[-1] * 32))


def naive(group: list[float]) -> list[float]:
    """One group of 32: every e2m1 value tried for every number, at three scales."""
    largest = max(map(abs, group))
    if largest == 0:
        return group
    best: tuple[float, list[float]] | None = None
    for offset in (0, 1, -1):
        scale = 2.0 ** (math.floor(math.log2(largest)) - 2 + offset)
        rounded = []
        for value in group:
            # of two equally near ones the even code
            code = min(range(8), key=lambda c: (abs(GRID[c] * scale - abs(value)), c % 2))
            rounded.append(math.copysign(GRID[code] * scale, value))
        error = sum((a - b) ** 2 for a, b in zip(rounded, group, strict=True))
        if best is None or error < best[0]:
            best = error, rounded
    assert best is not None
    return best[1]


@given(st.integers(0, 10_000), st.sampled_from([0.3, 1.0, 4.0]))
def test_rounding_is_the_naive_loop(seed: int, shape: float) -> None:
    rng = np.random.default_rng(seed)
    # gamma-like magnitudes: from groups of like sizes to single large ones
    values = torch.from_numpy(rng.normal(0, 1, (2, 64)) * rng.gamma(shape, size=(2, 64)))
    got = values_of(*quantize(values)).double()
    want = [naive(group) for group in values.reshape(-1, 32).tolist()]
    torch.testing.assert_close(got.reshape(-1, 32), torch.tensor(want).double(), rtol=0, atol=0)


@given(st.integers(0, 10_000))
def test_what_is_representable_keeps_its_bytes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    blocks = torch.from_numpy(rng.integers(0, 256, (3, 5, 2, 16), np.uint8))
    scales = torch.from_numpy(rng.integers(100, 140, (3, 5, 2), np.uint8))
    blocks[..., 0] |= 7  # the largest value, 6, is in use: no smaller scale could hold it
    again = quantize(values_of(blocks, scales))
    assert torch.equal(again[0], blocks)
    assert torch.equal(again[1], scales)


def test_any_bytes_keep_their_values() -> None:
    rng = np.random.default_rng(0)
    blocks = torch.from_numpy(rng.choice(np.array([0, 1, 8, 9, 16, 128], np.uint8), (64, 1, 16)))
    scales = torch.full((64, 1), 120, dtype=torch.uint8)
    values = values_of(blocks, scales)
    assert torch.equal(values_of(*quantize(values)), values)


def test_transformers_reads_the_same_values() -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    values = torch.from_numpy(np.random.default_rng(1).normal(0, 0.02, (2, 48, 64)))
    blocks, scales = quantize(values)
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)  # [E, in, out]
    torch.testing.assert_close(theirs.transpose(1, 2), values_of(blocks, scales), rtol=0, atol=0)


@pytest.fixture(scope="module")
def problem() -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [64 + 3, 12] and the Gram matrix of correlated features."""
    rng = np.random.default_rng(2)
    mixed = rng.normal(0, 1, (400, 20)) @ rng.normal(0, 1, (20, 67))
    features = torch.from_numpy(mixed + 0.1 * rng.normal(0, 1, (400, 67)))
    return torch.from_numpy(rng.normal(0, 1, (67, 12))), features.T @ features


def loss(weights: torch.Tensor, rounded: torch.Tensor, metric: torch.Tensor) -> float:
    error = weights - rounded
    return float((error * (metric @ error)).sum())


def test_feedback_gives_representable_weights_nearer_than_plain_rounding(
    problem: tuple[torch.Tensor, torch.Tensor],
) -> None:
    weights, metric = problem
    (fed,) = with_feedback(weights[None], metric[None], 64, MXFP4.grid)
    again = values_of(*quantize(fed[:64].T.contiguous())).T.double()
    torch.testing.assert_close(again, fed[:64], rtol=0, atol=0)
    plain = weights.clone()
    plain[:64] = values_of(*quantize(weights[:64].T.contiguous())).T.double()
    assert loss(weights, fed, metric) < 0.5 * loss(weights, plain, metric)


def test_features_that_are_not_correlated_get_plain_rounding() -> None:
    weights = torch.from_numpy(np.random.default_rng(3).normal(0, 1, (32, 5)))
    metric = torch.eye(32, dtype=torch.float64) * 3
    (fed,) = with_feedback(weights[None], metric[None], 32, MXFP4.grid)
    plain = values_of(*quantize(weights.T.contiguous())).T.double()
    torch.testing.assert_close(fed, plain, rtol=0, atol=0)


def test_ties_go_to_the_even_code() -> None:
    middles = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -5.0])
    rounded = nearest(middles, torch.zeros(1, dtype=torch.int32))
    assert rounded.tolist() == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, -4.0]
