"""What routers, gate_up and down projections can each add to compensation: a study.

    python benchmarks/compensation_levels.py --groups router [gate_up] [down]
        [--keep-n 20] [--blocks 32] [--eval-blocks 32] [--seq-len 1024] [--iterations 30]
        [--ridge 0.03] [--home DIR]
        [-- SETTING=VALUE ...]

Layer by layer one Gauss-Newton step: the layer's output, linearised in the chosen parameters of its
kept experts, is moved to the unpruned stream (robust token weights) by conjugate gradients on the
damped normal equations; each parameter is scaled by its group's mean square, so that one ridge
serves all. Tokens are routed anew before the residual on held-out rows decides how much of the step
is taken: all, a half, a quarter, or none. Weights stay float32. Prints the residual of each layer
and the change of PPL in % on UNION and every pack, as benchmarks/compensation.py does.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import untold
from runs import session, settings
from torch.func import jvp, vjp

from eaft_prune.core.types import UNION, Blocks
from eaft_prune.engines.transformers import TransformersEngine
from eaft_prune.pipeline.arrow import open_base
from eaft_prune.pipeline.criterion import select
from eaft_prune.repair import streams as activations
from eaft_prune.repair.least_squares import squares
from eaft_prune.stages.pack import BlockRequest

GROUPS = {
    "router": ("router.weight", "router.bias"),
    "gate_up": ("experts.gate_up_proj", "experts.gate_up_proj_bias"),
    "down": ("experts.down_proj", "experts.down_proj_bias"),
}
HELD_OUT = 0.2  # of the calibration rows
STEPS = (1.0, 0.5, 0.25, 0.0)
PROBES = 4  # of the mean squares
Weights = dict[str, torch.Tensor]
Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Problem:
    """One layer at the predictors of scored tokens: what enters, what should leave, weights."""

    mlp: Any
    top_k: int
    x_TH: torch.Tensor
    goal_TH: torch.Tensor
    roots_T1: torch.Tensor

    def at(self, chosen_T: torch.Tensor) -> Problem:
        parts = (self.x_TH[chosen_T], self.goal_TH[chosen_T], self.roots_T1[chosen_T])
        return Problem(self.mlp, self.top_k, *parts)

    def route(self, weights: Weights) -> torch.Tensor:
        logits = self.x_TH @ weights["router.weight"].T + weights["router.bias"]
        return logits.topk(self.top_k, 1).indices

    def output(self, weights: Weights, ids_TK: torch.Tensor) -> torch.Tensor:
        """sum over a token's experts of gate x output, [T, H]."""
        logits = self.x_TH @ weights["router.weight"].T + weights["router.bias"]
        gates_TK = torch.softmax(logits.gather(1, ids_TK), 1)
        out = torch.zeros_like(self.x_TH)
        for expert in range(len(weights["router.bias"])):
            rows, slots = (ids_TK == expert).nonzero(as_tuple=True)
            inner = self.x_TH[rows] @ weights["experts.gate_up_proj"][expert]
            h = self.mlp.experts._apply_gate(inner + weights["experts.gate_up_proj_bias"][expert])
            y = h @ weights["experts.down_proj"][expert] + weights["experts.down_proj_bias"][expert]
            out = out.index_add(0, rows, gates_TK[rows, slots][:, None] * y)
        return out

    def rest(self, weights: Weights) -> float:
        """The weighted squares left, tokens routed by these weights."""
        left = self.goal_TH - self.output(weights, self.route(weights))
        return squares(left * self.roots_T1)


def step(
    problem: Problem, weights: Weights, names: list[str], ridge: float, iterations: int
) -> Weights:
    """Gauss-Newton: the change of the named weights that the linearised layer asks for."""
    ids = problem.route(weights)

    def output(*values: torch.Tensor) -> torch.Tensor:
        now = {**weights, **dict(zip(names, values, strict=True))}
        return problem.output(now, ids) * problem.roots_T1

    here = tuple(weights[name] for name in names)
    at_here = vjp(output, *here)
    found, pull = at_here[0], at_here[1]
    generator = torch.Generator().manual_seed(0)
    means = [0.0] * len(here)
    for _ in range(PROBES):  # E (J'z)^2 = diag(J'J)
        signs = torch.randint(0, 2, found.shape, generator=generator).to(found) * 2 - 1
        means = [s + float(v.square().mean()) for s, v in zip(means, pull(signs), strict=True)]
    scales = [(mean / PROBES + 1e-30) ** -0.5 for mean in means]

    def transposed(left: torch.Tensor) -> Tensors:
        return tuple(v * s for v, s in zip(pull(left), scales, strict=True))

    def squared(change: Tensors) -> Tensors:
        scaled = tuple(c * s for c, s in zip(change, scales, strict=True))
        moved = jvp(output, here, scaled)[1]
        both = zip(transposed(moved), change, strict=True)
        return tuple(v + ridge * c for v, c in both)

    solution = solved(squared, transposed(problem.goal_TH * problem.roots_T1 - found), iterations)
    return {n: c * s for n, c, s in zip(names, solution, scales, strict=True)}


def solved(apply: Callable[[Tensors], Tensors], right: Tensors, iterations: int) -> Tensors:
    """Conjugate gradients from zero."""

    def dot(a: Tensors, b: Tensors) -> float:
        return sum(float((u * v).sum()) for u, v in zip(a, b, strict=True))

    def plus(a: Tensors, factor: float, b: Tensors) -> Tensors:
        return tuple(u + factor * v for u, v in zip(a, b, strict=True))

    x, left, way = tuple(map(torch.zeros_like, right)), right, right
    size = dot(left, left)
    for _ in range(iterations):
        applied = apply(way)
        length = size / dot(way, applied)
        x, left = plus(x, length, way), plus(left, -length, applied)
        before, size = size, dot(left, left)
        way = plus(left, size / before, way)
    return x


def parameter(mlp: Any, name: str) -> torch.Tensor:
    owner, attribute = name.split(".")
    value: torch.Tensor = getattr(getattr(mlp, owner), attribute).data
    return value


def roots(target_TH: torch.Tensor) -> torch.Tensor:
    """Roots of the robust token weights m / (||D_t||^2 + m), m = mean ||D_t||^2, [T, 1]."""
    squares_T = target_TH.square().sum(1)
    mean = squares_T.mean()
    return (mean / (squares_T + mean)).sqrt()[:, None]


def held_out(blocks: Blocks) -> torch.Tensor:
    """Of every scored token whether its row is held out, [T]."""
    row_T = blocks.row_BS[blocks.scored_BS]
    rows = np.random.default_rng(0).permutation(np.unique(row_T))
    return torch.from_numpy(np.isin(row_T, rows[: max(1, round(len(rows) * HELD_OUT))]))


def nll(engine: TransformersEngine, blocks: dict[str, Blocks]) -> dict[str, float]:
    return {
        pack: -float(engine.score(part, untold).logp_T.mean(dtype="float64"))
        for pack, part in blocks.items()
    }


def main(arguments: Sequence[str] | None = None) -> list[float]:
    """Of each layer the squares left on held-out rows, of those before."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("settings", nargs="*")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, required=True)
    parser.add_argument("--keep-n", type=int, default=20)
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--eval-blocks", type=int, default=32)
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--ridge", type=float, default=0.03)
    parser.add_argument("--home", type=Path, default=Path(tempfile.gettempdir()) / "levels")
    parser.add_argument("--seq-len", type=int, default=1024, help="of the evaluation")
    asked = parser.parse_args(arguments)
    experiment = settings(
        [
            "pruning=eaft_reap", f"pruning.keep_n={asked.keep_n}", "runtime.progress=false",
            "runtime.device=cpu",
            f"runtime.store_dir={asked.home}", *asked.settings,
        ]
    )  # fmt: skip
    bench = session(experiment, asked.home)
    base = open_base(bench)
    plan = select(bench, base).plan
    engine = bench.local_engine(base)
    if torch.cuda.is_available():  # loaded on the CPU: there experts are not packed
        device = torch.device("cuda")
        engine = replace(engine, model=engine.model.to(device), device=device)
    request = BlockRequest(
        UNION, "profile", experiment.profile.seq_len, asked.blocks, 0, "--blocks"
    )
    calibration = bench.blocks(base, request).value
    evaluation = {
        pack: bench.blocks(
            base,
            BlockRequest(
                pack,
                "eval",
                asked.seq_len,
                asked.eval_blocks,
                experiment.eval.seed,
                "--eval-blocks",
            ),
        ).value
        for pack in (UNION, *bench.pack_files())
    }
    before = nll(engine, evaluation)

    def lost() -> str:
        with engine.masked(plan):
            after = nll(engine, evaluation)
        return "  ".join(f"{p} {100 * math.expm1(after[p] - before[p]):+.2f}%" for p in after)

    print(f"none  {lost()}", flush=True)
    names = [name for group in asked.groups for name in GROUPS[group]]
    held_T, shares = held_out(calibration).to(engine.device), []
    streams = activations.start(engine, plan, calibration)
    for number, layer in enumerate(engine.model.base_model.layers):
        target_TH = activations.step(streams, number, untold)
        kept = list(plan.kept[number])
        parts = zip(streams.asked, streams.predictors, strict=True)
        x_TH = torch.cat([part.hidden[rows] for part, rows in parts]).float()
        everything = [name for group in GROUPS.values() for name in group]
        weights = {name: parameter(layer.mlp, name)[kept].float().clone() for name in everything}
        roots_T1 = roots(target_TH)
        whole = Problem(layer.mlp, engine.top_k, x_TH, target_TH, roots_T1)
        goal_TH = target_TH + whole.output(weights, whole.route(weights))
        whole = replace(whole, goal_TH=goal_TH)
        change = step(whole.at(~held_T), weights, names, asked.ridge, asked.iterations)
        held = whole.at(held_T)
        tried = [
            {**weights, **{name: weights[name] + size * change[name] for name in names}}
            for size in STEPS
        ]
        with torch.inference_mode():
            rests = [held.rest(one) for one in tried]
            best = min(range(len(STEPS)), key=rests.__getitem__)
            for name in names:
                parameter(layer.mlp, name)[kept] = tried[best][name].to(engine.model.dtype)
            activations.again(streams, number)
        shares.append(rests[best] / rests[-1])
        print(f"layer {number}  held out {shares[-1]:.3f}  step {STEPS[best]}")
    print(f"{'+'.join(asked.groups)}  {lost()}", flush=True)
    return shares


if __name__ == "__main__":
    main()
