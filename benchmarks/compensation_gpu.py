"""Time and memory of one layer's compensation at the shape of gpt-oss-20b.

    python benchmarks/compensation_gpu.py [--tokens 87000] [--experts 20] [--top-k 4] [--size 2880]
        [--device cuda]

Features and target are random numbers of the layer's shape (time does not depend on them); the
fits are compared on the ridge objective per token, and rounding to MXFP4 in the metric of the Gram
matrix.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from common import device_of, forget_peak, name_of, peak_gb, wait

from eaft_prune.checkpoints.formats import MXFP4
from eaft_prune.checkpoints.formats.e2m1 import quantize
from eaft_prune.engines.packed import dequantize
from eaft_prune.repair.least_squares import (
    Features,
    gauss_seidel,
    gram,
    product,
    regularised,
    solve,
)
from eaft_prune.repair.rounding import with_feedback

T = TypeVar("T")
RIDGE = 0.1


def timed(what: str, device: torch.device, work: Callable[[], T]) -> T:
    """Run once, print seconds and the peak of the device's memory meanwhile."""
    wait(device)
    forget_peak(device)
    started = time.perf_counter()
    found = work()
    wait(device)
    seconds = time.perf_counter() - started
    print(f"{what:44} {seconds:8.2f} s   peak {peak_gb(device):6.1f} GB", flush=True)
    return found


def drawn(
    tokens: int, experts: int, top_k: int, size: int, device: torch.device
) -> tuple[Features, torch.Tensor]:
    """Features of tokens routed at random, correlated as activations are, and what they can fit."""
    make = torch.Generator(device).manual_seed(0)
    scores = torch.rand(tokens, experts, generator=make, device=device)
    chosen = scores.topk(top_k, dim=1).indices
    common = torch.randn(256, size, generator=make, device=device) / 16
    rows, values = [], []
    for expert in range(experts):
        here = (chosen == expert).any(1).nonzero()[:, 0]
        gate = torch.rand(len(here), 1, generator=make, device=device)
        latent = torch.randn(len(here), 256, generator=make, device=device)
        noise = torch.randn(len(here), size, generator=make, device=device)
        inner = latent @ common + 0.3 * noise
        rows.append(here)
        values.append(torch.cat([inner * gate, gate], 1))
    features = Features(tokens, tuple(rows), tuple(values))
    shape = (features.unknowns, size)
    truth = torch.randn(shape, generator=make, device=device) / size**0.5
    target = product(features, truth)
    target += torch.randn(target.shape, generator=make, device=device) * target.std()
    return features, target


def fitted(
    features: Features, target_TH: torch.Tensor, penalty: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The exact solution, and F'F + penalty I."""
    device = target_TH.device
    squares, right = timed("Gram matrix", device, lambda: gram(features, target_TH, torch.float32))
    exact = timed(
        "exact: one Cholesky, all targets", device, lambda: solve(squares, right, penalty)
    )
    return exact, regularised(squares, penalty)


def main(arguments: Sequence[str] | None = None) -> tuple[float, float, float]:
    """Objectives, of that of no change, of the exact and of the iterated solution.

    And the squared error of rounding with feedback over that of rounding to the nearest.
    """
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("tokens", 87000), ("experts", 20), ("top-k", 4), ("size", 2880)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--device", type=device_of, default="cuda")
    given = parser.parse_args(arguments)
    device: torch.device = given.device
    print(name_of(device), given, flush=True)
    features, target = drawn(given.tokens, given.experts, given.top_k, given.size, device)
    print(f"{features.unknowns:,} unknowns x {given.size} targets, {given.tokens:,} tokens")

    penalty = RIDGE * features.mean_square

    def objective(x_UH: torch.Tensor) -> float:
        rest = (target - product(features, x_UH)).double().square().sum()
        return float(rest + penalty * x_UH.double().square().sum()) / start

    start = float(target.double().square().sum())
    exact, metric = fitted(features, target, penalty)
    solved = objective(exact)
    print(f"  objective {solved:.6f} of that of no change", flush=True)
    iterated = objective(
        timed(
            "Gauss-Seidel", device, lambda: gauss_seidel(features, target, penalty, torch.float32)
        )
    )
    print(f"  objective {iterated:.6f}", flush=True)
    base = torch.randn(exact.shape, generator=torch.Generator(device).manual_seed(1), device=device)
    wanted = base * 0.02 + exact
    weights, grid = given.experts * given.size, MXFP4.grid
    assert grid is not None, "MXFP4 has a grid"

    def loss(stored_UH: torch.Tensor) -> float:
        away = stored_UH - wanted
        return float((away * (metric @ away)).double().sum())

    fed = timed("MXFP4 with feedback", device, lambda: with_feedback(wanted, metric, weights, grid))
    near = wanted.clone()
    blocks, scales = quantize(wanted[:weights].view(given.experts, -1, given.size).transpose(1, 2))
    out = torch.empty((*scales.shape[:-1], scales.shape[-1] * 32), device=device)
    near[:weights] = dequantize(blocks, scales, out).transpose(1, 2).reshape(weights, -1)
    gained = loss(fed) / loss(near)
    print(f"  squared error in the metric, feedback / nearest: {gained:.3f}")
    return solved, iterated, gained


if __name__ == "__main__":
    main()
