"""What training wins where repair by least squares does: the yardstick, not a way to prune.

    python benchmarks/distillation.py [--keep-n 20] [--criterion reap_sum] [--rates 3e-4 1e-3]
        [--epochs 4] [--batch 4] [--eval-blocks 64] [SETTING=VALUE ...]

The pruned model's experts and routers are trained in float32 by Adam, the rate falling to zero as
a cosine, to minimise KL(base || pruned) at the scored tokens of the blocks that repair is fitted on
(compensation.num_blocks, compensation.seed), and judged as benchmarks/compensation.py judges: loss
of PPL on UNION blocks of rows that nothing saw. One line a rate, nothing held out to choose it by:
the best of them flatters training.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from runs import finished, session, settings

from eaft_prune.checkpoints.read import open_model
from eaft_prune.core.types import UNION, Blocks
from eaft_prune.engines.loading import load_files
from eaft_prune.engines.transformers import TransformersEngine
from eaft_prune.pipeline.requests import compensating, evaluating


@dataclass(frozen=True)
class Trained:
    """Loss of PPL in percent before and after, and seconds of training."""

    before: float
    after: float
    seconds: float


def main(arguments: Sequence[str] | None = None) -> dict[float, Trained]:
    """Every line by its learning rate."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep-n", type=int, default=20)
    parser.add_argument("--criterion", default="reap_sum")
    parser.add_argument("--rates", nargs="*", type=float, default=[3e-4, 1e-3])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4, help="blocks a step")
    parser.add_argument("--eval-blocks", type=int, default=64)
    given, rest = parser.parse_known_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        return _main(given, [f"pruning={given.criterion}", *rest], Path(folder))


def _main(given: argparse.Namespace, rest: list[str], home: Path) -> dict[float, Trained]:
    plain = ["engine.experts=dense", "runtime.dtype=float32"]  # which can be trained
    asked = [
        *rest,
        *plain,
        f"pruning.keep_n={given.keep_n}",
        f"eval.num_blocks={given.eval_blocks}",
    ]
    result = finished([*asked, "eval.candidates=[pruned]"], home)
    place = session(settings(asked), home / "store")
    base = place.base()
    fitted = place.blocks(base, compensating(place.experiment)).value
    judged = place.blocks(
        base, next(one for one in evaluating(place.experiment) if one.pack == UNION)
    ).value
    teacher = load_files(base.files, place.options)
    found = {}
    for rate in given.rates:
        student = load_files(open_model(Path(result["checkpoint"]["path"])), place.options)
        before = loss(student, teacher, judged)
        started = time.perf_counter()
        train(student, teacher, fitted, rate, given.epochs, given.batch)
        spent = time.perf_counter() - started
        line = found[rate] = Trained(before, loss(student, teacher, judged), spent)
        print(
            f"keep {given.keep_n} rate {rate:g}: {line.before:+.2f}% before, {line.after:+.2f}% "
            f"after, {line.after / line.before:.3f} left, {spent:.0f} s, "
            f"{fitted.scored_tokens:,} tokens",
            flush=True,
        )
    return found


def loss(student: TransformersEngine, teacher: TransformersEngine, blocks: Blocks) -> float:
    """100 (PPL / PPL of the teacher - 1)."""
    mine, theirs = (
        float(engine.score(blocks, lambda tokens: None).logp_T.mean(dtype="float64"))
        for engine in (student, teacher)
    )
    return 100 * (math.exp(theirs - mine) - 1)


def train(
    student: TransformersEngine, teacher: TransformersEngine, blocks: Blocks, rate: float,
    epochs: int, batch: int,
) -> None:  # fmt: skip
    """In place."""
    model = student.model
    model.set_experts_implementation("eager")
    model.set_attn_implementation("eager")
    chosen = [
        parameter.requires_grad_(".mlp." in name) for name, parameter in model.named_parameters()
    ]
    optimiser = torch.optim.Adam([p for p in chosen if p.requires_grad], lr=rate)
    steps = epochs * math.ceil(len(blocks) / batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for some in torch.randperm(len(blocks), generator=generator).split(batch):
            part = replace(
                blocks, ids_BS=blocks.ids_BS[some.numpy()], scored_BS=blocks.scored_BS[some.numpy()]
            )
            ids = torch.from_numpy(part.ids_BS).long().to(student.device)
            scored = torch.from_numpy(part.scored_BS).to(student.device)[:, 1:]
            with torch.no_grad():
                wanted = logp(teacher.model, ids)[scored]
            gap = (wanted.exp() * (wanted - logp(model, ids)[scored])).sum(-1).mean()
            optimiser.zero_grad()
            gap.backward()
            optimiser.step()
            schedule.step()


def logp(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """ln p of every token after each position but the last, [b, S - 1, V]."""
    logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return torch.log_softmax(logits.float(), -1)


if __name__ == "__main__":
    main()
