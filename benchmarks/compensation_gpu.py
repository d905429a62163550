"""Time and memory of one layer's compensation at the shape of gpt-oss-20b on a GPU.

    python benchmarks/compensation_gpu.py [--tokens 87000] [--experts 20] [--top-k 4] [--size 2880]

Features and target are random numbers of the layer's shape (time does not depend on them); the
fits are compared on the ridge objective per token, and rounding to MXFP4 in the metric of the Gram
matrix.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import TypeVar

import torch

from eaft_prune.engines import mxfp4
from eaft_prune.engines.packed import dequantize
from eaft_prune.repair.least_squares import (
    Features,
    gauss_seidel,
    gram,
    product,
    regularised,
    solve,
)

T = TypeVar("T")
RIDGE = 0.1


def timed(what: str, work: Callable[[], T]) -> T:
    """Run once, print seconds and the peak of the device's memory meanwhile."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    found = work()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated() / 1e9
    print(f"{what:44} {seconds:8.2f} s   peak {peak:6.1f} GB", flush=True)
    return found


def drawn(tokens: int, experts: int, top_k: int, size: int) -> tuple[Features, torch.Tensor]:
    """Features of tokens routed at random, correlated as activations are, and what they can fit."""
    make = torch.Generator("cuda").manual_seed(0)
    scores = torch.rand(tokens, experts, generator=make, device="cuda")
    chosen = scores.topk(top_k, dim=1).indices
    common = torch.randn(256, size, generator=make, device="cuda") / 16
    rows, values = [], []
    for expert in range(experts):
        here = (chosen == expert).any(1).nonzero()[:, 0]
        gate = torch.rand(len(here), 1, generator=make, device="cuda")
        latent = torch.randn(len(here), 256, generator=make, device="cuda")
        noise = torch.randn(len(here), size, generator=make, device="cuda")
        inner = latent @ common + 0.3 * noise
        rows.append(here)
        values.append(torch.cat([inner * gate, gate], 1))
    features = Features(tokens, tuple(rows), tuple(values))
    shape = (features.unknowns, size)
    truth = torch.randn(shape, generator=make, device="cuda") / size**0.5
    target = product(features, truth)
    target += torch.randn(target.shape, generator=make, device="cuda") * target.std()
    return features, target


def fitted(
    features: Features, target_TH: torch.Tensor, penalty: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The exact solution, and F'F + penalty I."""
    squares, right = timed("Gram matrix", lambda: gram(features, target_TH, torch.float32))
    exact = timed("exact: one Cholesky, all targets", lambda: solve(squares, right, penalty))
    return exact, regularised(squares, penalty)


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, value in (("tokens", 87000), ("experts", 20), ("top-k", 4), ("size", 2880)):
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args()
    print(torch.cuda.get_device_name(), given, flush=True)
    features, target = drawn(given.tokens, given.experts, given.top_k, given.size)
    print(f"{features.unknowns:,} unknowns x {given.size} targets, {given.tokens:,} tokens")

    penalty = RIDGE * features.mean_square

    def objective(x_UH: torch.Tensor) -> float:
        rest = (target - product(features, x_UH)).double().square().sum()
        return float(rest + penalty * x_UH.double().square().sum())

    start = float(target.double().square().sum())
    exact, metric = fitted(features, target, penalty)
    print(f"  objective {objective(exact) / start:.6f} of that of no change", flush=True)
    rough = timed("Gauss-Seidel", lambda: gauss_seidel(features, target, penalty, torch.float32))
    print(f"  objective {objective(rough) / start:.6f}", flush=True)
    del rough
    base = torch.randn(exact.shape, generator=torch.Generator("cuda").manual_seed(1), device="cuda")
    wanted = base * 0.02 + exact
    weights = given.experts * given.size

    def loss(stored_UH: torch.Tensor) -> float:
        away = stored_UH - wanted
        return float((away * (metric @ away)).double().sum())

    fed = timed("MXFP4 with feedback", lambda: mxfp4.with_feedback(wanted, metric, weights))
    near = wanted.clone()
    blocks, scales = mxfp4.quantize(
        wanted[:weights].view(given.experts, -1, given.size).transpose(1, 2)
    )
    out = torch.empty((*scales.shape[:-1], scales.shape[-1] * 32), device="cuda")
    near[:weights] = dequantize(blocks, scales, out).transpose(1, 2).reshape(weights, -1)
    print(f"  squared error in the metric, feedback / nearest: {loss(fed) / loss(near):.3f}")


if __name__ == "__main__":
    main()
