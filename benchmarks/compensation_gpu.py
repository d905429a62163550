"""Time, memory and floor of one layer's repair at the shape of gpt-oss-20b.

    python benchmarks/compensation_gpu.py [--tokens 87000] [--experts 20] [--top-k 4] [--size 2880]
        [--device cuda] [--exact]

Features and target are random numbers of the layer's shape, correlated as activations are. Beside
each time stand the floating point operations and the bytes that the work cannot do without, and
what they take at the device's own rate of TF32 products and of copies, measured first. --exact
solves the full Gram matrix too, which at this size takes 40 GB. Fits are compared on the ridge
objective, rounding to MXFP4 in the metric of the Gram blocks.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from common import device_of, forget_peak, matmul_rate, name_of, peak_gb, seconds, wait

from eaft_prune.checkpoints.formats import MXFP4
from eaft_prune.repair.conjugate_gradients import fast_products
from eaft_prune.repair.least_squares import Features, mean_square, regularised, solve, squares
from eaft_prune.repair.rounding import with_feedback

T = TypeVar("T")
RIDGE = 0.1
ITERATIONS = 10  # that the floor of the solution counts


@dataclass(frozen=True)
class Clock:
    """A device, and the rates that floors are reckoned with."""

    device: torch.device
    flops: float  # a second, of float32 products as repair does them
    bytes: float  # a second, read or written

    def timed(self, what: str, flops: float, moved: float, work: Callable[[], T]) -> T:
        """Run once; print seconds, the floor, and the peak of the device's memory meanwhile."""
        wait(self.device)
        forget_peak(self.device)
        started = time.perf_counter()
        found = work()
        wait(self.device)
        spent = time.perf_counter() - started
        floor = max(flops / self.flops, moved / self.bytes)
        print(
            f"{what:34} {spent:8.2f} s  floor {floor:6.2f} s ({flops / 1e12:6.1f} TFLOP, "
            f"{moved / 1e9:6.1f} GB)  peak {peak_gb(self.device):6.1f} GB",
            flush=True,
        )
        return found


def clock(device: torch.device) -> Clock:
    """Rates of a large product and of a large copy."""
    large = device.type == "cuda"
    with fast_products():
        flops = matmul_rate(8192 if large else 512, torch.float32, device)
    source = torch.zeros((1 << 28) if large else (1 << 22), device=device)
    copied = seconds(lambda: source.clone(), 3, device)
    return Clock(device, flops, 2 * source.nbytes / copied)


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
    shape = (experts, size + 1, size)
    truth = torch.randn(shape, generator=make, device=device) / size**0.5
    target = features.product(truth)
    target += torch.randn(target.shape, generator=make, device=device) * target.std()
    return features, target


def exactly(features: Features, target_TH: torch.Tensor, penalty: float) -> torch.Tensor:
    """One Cholesky factorisation of the full Gram matrix, [K, C, H]."""
    count, width = len(features.values), features.columns
    whole = torch.zeros(count, width, count, width, device=target_TH.device)
    for i, (rows_i, left) in enumerate(features):
        place = torch.full((features.tokens,), -1, device=target_TH.device)
        place[rows_i] = torch.arange(len(rows_i), device=target_TH.device)
        for j, (rows_j, right) in enumerate(features):
            at = place[rows_j]
            whole[i, :, j] = left[at[at >= 0]].T @ right[at >= 0]
    square = whole.view(count * width, count * width)
    square.diagonal().add_(penalty)
    right_UH = features.pulled(target_TH).flatten(0, 1)
    factor = torch.linalg.cholesky(square)
    return torch.cholesky_solve(right_UH, factor).view(count, width, -1)


def main(arguments: Sequence[str] | None = None) -> tuple[float, float, float]:
    """Objectives, of that of no change, of the joint solution and, with --exact, of the exact one.

    And the squared error of rounding with feedback over that of rounding to the nearest.
    """
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("tokens", 87000), ("experts", 20), ("top-k", 4), ("size", 2880)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--device", type=device_of, default="cuda")
    parser.add_argument("--exact", action="store_true")
    given = parser.parse_args(arguments)
    device: torch.device = given.device
    watch = clock(device)
    print(f"{name_of(device)}, {watch.flops / 1e12:.0f} TFLOP/s, {watch.bytes / 1e12:.2f} TB/s")
    features, target = drawn(given.tokens, given.experts, given.top_k, given.size, device)
    held = sum(values.numel() for values in features.values)
    size, columns, count = given.size, features.columns, given.experts
    print(f"{count} x {columns} unknowns x {size} targets, {given.tokens:,} tokens")

    grams = watch.timed("Gram blocks", 2 * held * columns, 4 * held, features.grams)
    penalty = RIDGE * mean_square(grams)
    start = squares(target)

    def objective(x_KCH: torch.Tensor | None) -> float:
        assert x_KCH is not None, "a ridge of 0.1 has a solution"
        rest = squares(target - features.product(x_KCH))
        return (rest + penalty * squares(x_KCH.flatten(0, 1))) / start

    work = ITERATIONS * 4 * held * size
    moved = ITERATIONS * 4 * (2 * held + 6 * target.numel() + 8 * count * columns * size)
    found = watch.timed(
        "joint solution", work, moved, lambda: solve(features, target, penalty, grams)
    )
    joint = exact = objective(found)
    print(f"  objective {joint:.8f} of that of no change", flush=True)
    if given.exact:
        flops = (count * columns) ** 2 * (count * columns / 3 + 2 * size)
        by_cholesky = watch.timed(
            "exact solution", flops, 4 * (count * columns) ** 2,
            lambda: exactly(features, target, penalty),
        )  # fmt: skip
        exact = objective(by_cholesky)
        print(f"  objective {exact:.8f}", flush=True)
    assert found is not None
    shape = (count, columns, size)
    base = torch.randn(shape, generator=torch.Generator(device).manual_seed(1), device=device)
    wanted, metric, grid = base * 0.02 + found, regularised(grams, penalty), MXFP4.grid
    assert grid is not None, "MXFP4 has a grid"

    def loss(stored_KCH: torch.Tensor) -> float:
        away = (stored_KCH - wanted).to(metric.dtype)
        return float((away * (metric @ away)).sum())

    fed = watch.timed(
        "MXFP4 with feedback",
        count * columns**2 * (size + columns),
        4 * count * columns * (columns // grid.group) * size,
        lambda: with_feedback(wanted, metric, size, grid),
    )
    near = wanted.clone()
    near[:, :size] = MXFP4.decode(MXFP4.encode(wanted[:, :size]))
    gained = loss(fed) / loss(near)
    print(f"  squared error in the metric, feedback / nearest: {gained:.3f}")
    return exact, joint, gained


if __name__ == "__main__":
    main()
