"""What searching further from a chosen plan gains: swaps, and an evolutionary search.

    python benchmarks/refine.py [--evaluations 100] [--keep 20] [--seeds 0 1 2] [--start greedy]
        [--blocks 16] [--seq-len 1024] [--store DIR] [SETTING=VALUE ...]

Both begin with the plan of one of benchmarks/methods.py and may evaluate as many plans, masked on
the blocks of `marginal`. The swap exchanges one kept and one dropped expert of a layer, each among
the six next to the cut, and keeps the exchange if the loss falls. The evolution keeps the 4 best of
all plans; a child takes each layer from one of two of them, then 1 to 3 such exchanges. Prints the
change of PPL in % on these blocks and on evaluation blocks that nothing saw.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from methods import METHODS, evaluation_request, experiment, mean_nll
from runs import n_experts, session

from eaft_prune.core.types import ExpertScores, KeepPlan
from eaft_prune.pipeline.criterion import select
from eaft_prune.pipeline.requests import calibration
from eaft_prune.pipeline.session import Resident

Loss = Callable[[KeepPlan], float]
NEAR, PARENTS = 6, 4


def exchanged(plan: KeepPlan, scores: ExpertScores, rng: np.random.Generator) -> KeepPlan:
    """One kept and one dropped expert of a layer change places."""
    layer = int(rng.integers(len(plan.kept)))
    ranked = np.argsort(scores.score_LE[layer], kind="stable").tolist()
    inside = [e for e in ranked if e in plan.kept[layer]][:NEAR]
    outside = [e for e in ranked if e not in plan.kept[layer]][-NEAR:]
    swapped = {*plan.kept[layer], int(rng.choice(outside))} - {int(rng.choice(inside))}
    kept = list(plan.kept)
    kept[layer] = tuple(sorted(swapped))
    return replace(plan, kept=tuple(kept))


def swap(
    loss: Loss, start: KeepPlan, scores: ExpertScores, budget: int, rng: np.random.Generator
) -> KeepPlan:
    best, least = start, loss(start)
    for _ in range(budget - 1):
        tried = exchanged(best, scores, rng)
        found = loss(tried)
        if found < least:
            best, least = tried, found
    return best


def evolve(
    loss: Loss, start: KeepPlan, scores: ExpertScores, budget: int, rng: np.random.Generator
) -> KeepPlan:
    population = [(loss(start), 0, start)]
    for number in range(1, budget):
        one, other = (population[int(i)][2] for i in rng.integers(len(population), size=2))
        sides = rng.integers(2, size=len(start.kept))
        pairs = zip(one.kept, other.kept, sides, strict=True)
        child = replace(start, kept=tuple(b if side else a for a, b, side in pairs))
        for _ in range(int(rng.integers(1, 4))):
            child = exchanged(child, scores, rng)
        population = sorted([*population, (loss(child), number, child)])[:PARENTS]
    return population[0][2]


def main(arguments: Sequence[str] | None = None) -> list[tuple[float, float]]:
    """Of every line the change of PPL in % on calibration and on evaluation blocks."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("settings", nargs="*")
    parser.add_argument("--evaluations", type=int, default=100)
    parser.add_argument("--keep", type=int, nargs=1, default=[20])
    parser.add_argument("--down-to", type=int, default=16)  # of greedy's rounds, as in methods.py
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--start", choices=METHODS, default="greedy")
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--store", type=Path)
    asked = parser.parse_args(arguments)
    found: list[tuple[float, float]] = []
    print("| seed | search | calibration | evaluation | tokens |")
    print("| ---: | --- | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as temporary:
        home = asked.store or Path(temporary)
        resident = Resident()
        for seed in asked.seeds:
            how = (*METHODS[asked.start], f"pruning.keep_n={asked.keep[0]}")
            rounds = (f"marginal.rounds={n_experts(asked.settings) - asked.down_to}",)
            settings = experiment(asked, home / "checkpoints", seed, (*how, *rounds))
            if settings.runtime.threads:
                torch.set_num_threads(settings.runtime.threads)
            place = session(settings, home, resident)
            base = place.base()
            chosen = select(place, base)
            request = calibration(place.experiment)
            loss = partial(mean_nll, place, base, base, request=request)
            later = partial(mean_nll, place, base, base, request=evaluation_request(place))
            whole, unseen = loss(None), later(None)
            for name, search in (("none", None), ("swaps", swap), ("evolution", evolve)):
                plan, budget = chosen.plan, 0
                if search is not None:
                    budget, rng = asked.evaluations, np.random.default_rng(seed)
                    plan = search(loss, chosen.plan, chosen.scores, budget, rng)
                ours = 100 * math.expm1(loss(plan) - whole)
                theirs = 100 * math.expm1(later(plan) - unseen)
                found.append((ours, theirs))
                tokens = budget * place.blocks(base, request).value.ids_BS.size
                print(f"| {seed} | {name} | {ours:+.2f} | {theirs:+.2f} | {tokens:,} |", flush=True)
    return found


if __name__ == "__main__":
    main()
