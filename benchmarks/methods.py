"""What every way to choose experts loses on the demo model, and what choosing cost.

    python benchmarks/methods.py [--seeds 0 1 2] [--keep 28 24 20 16] [--blocks 16]
        [--seq-len 1024] [--methods NAME ...] [--store DIR] [--write benchmarks/README.md]
        [-- SETTING=VALUE ...]

One process, one resident model. For every seed (profile.seed, marginal.seed, eval.seed and
pruning.seed, compensation.seed) each method chooses a plan for every keep_n; plans are evaluated
masked, repaired ones as written checkpoints, on UNION blocks of the evaluation rows, each once.
Cells are 100 (PPL / PPL_base - 1): the mean over seeds and the reach of its 95% interval (Student's
t over seeds). Cost is what all plans of a seed took to choose and to repair: tokens through the
model, and seconds. Everything goes through the store: a second run reads it. --write puts the
tables between the markers of a file.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from runs import n_experts, session
from runs import settings as checked

from eaft_prune.checkpoints.model import Model
from eaft_prune.config import Experiment
from eaft_prune.core.outcome import StageRecord
from eaft_prune.core.types import UNION, KeepPlan
from eaft_prune.maths.intervals import student
from eaft_prune.pipeline.criterion import select
from eaft_prune.pipeline.evaluation import Side, measure
from eaft_prune.pipeline.export import write
from eaft_prune.pipeline.requests import evaluating
from eaft_prune.pipeline.session import Resident, Session
from eaft_prune.stages.pack import BlockRequest

REFERENCE = "EAFT-REAP"
RAGGED = ("pruning.selection=marginal_loss", "pruning.min_keep_n=8", "eval.candidates=[masked]")
REPAIRED = ("pruning.compensation=experts",)

METHODS = {
    "random": ("pruning=random", "pruning.core_pos_top_m=0"),
    "frequency": ("pruning=frequency",),
    "gate mass": ("pruning=gate_mass",),
    "EAN": ("pruning=ean",),
    "MAN": ("pruning=man", "pruning.core_pos_top_m=0"),
    "REAP mean": ("pruning=reap",),
    "REAP sum": ("pruning=reap_sum",),
    "EAFT-REAP": ("pruning=eaft_reap",),
    "EAFT-REAP policy": ("pruning=eaft_reap_policy",),
    "EAFT-REAP soft": ("pruning=eaft_reap_soft",),
    "leave-one-out": ("pruning=leave_one_out",),
    "greedy": ("pruning=greedy",),
    "EAFT-REAP, sizes by marginal loss": ("pruning=eaft_reap", *RAGGED),
    "greedy, sizes by marginal loss": ("pruning=greedy", *RAGGED),
    "REAP sum, repaired": ("pruning=reap_sum", *REPAIRED),
    "greedy, repaired": ("pruning=greedy", *REPAIRED),
}


@dataclass(frozen=True)
class Cost:
    """What choosing and compensating took: by stage key, so that what plans share counts once."""

    tokens: dict[str, int]
    seconds: dict[str, float]

    def __str__(self) -> str:
        return f"{sum(self.tokens.values()):,} | {sum(self.seconds.values()):.0f}"


def losses(
    place: Session, base: Model, keep: Sequence[int], nll: float
) -> tuple[list[float], Cost]:
    """Relative change of PPL in % at every keep_n, and the cost of all plans."""
    found, cost = [], Cost({}, {})
    request = evaluation_request(place)
    for keep_n in keep:
        pruning = place.experiment.pruning.model_copy(update={"keep_n": keep_n})
        asked = replace(place, experiment=place.experiment.model_copy(update={"pruning": pruning}))
        first = len(place.records)
        selection = select(asked, base)
        model = base
        mask: KeepPlan | None = selection.plan
        if pruning.compensation != "none":
            model, mask = write(asked, base, selection), None
        for record in place.records[first:]:
            unread = record.stage == "profile" and pruning.saliency == "random"
            if not unread and not record.stage.startswith(("pack/", "export", "inspect/")):
                cost.tokens[record.key] = tokens_of(record)
                cost.seconds[record.key] = record.seconds
        after = mean_nll(asked, base, model, mask, request)
        found.append(100 * math.expm1(after - nll))
    return found, cost


def tokens_of(record: StageRecord) -> int:
    """Through the model."""
    return int(record.facts.get("tokens", 0))


def evaluation_request(place: Session) -> BlockRequest:
    """UNION blocks of the evaluation rows, of the first length."""
    return next(one for one in evaluating(place.experiment) if one.pack == UNION)


def mean_nll(
    place: Session, base: Model, model: Model, plan: KeepPlan | None, request: BlockRequest
) -> float:
    """Mean -ln p over the blocks, of the model masked to the plan."""
    found = measure(place, base, Side("candidate", model, plan), [request])
    return -float(found.scores[UNION, request.seq_len].logp_T.mean(dtype="float64"))


def interval(values: Sequence[float]) -> str:
    """Mean and reach of the two-sided 95% interval."""
    if len(values) == 1:
        return f"{values[0]:+.2f}"
    reach = student(0.975, len(values)) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.mean(values):+.2f} ± {reach:.2f}"


def table(
    keep: Sequence[int], rows: dict[str, list[list[float]]], costs: dict[str, Cost] | None
) -> str:
    """Markdown; rows[method][seed][keep_n]."""
    head = ["method", *(f"keep {n}" for n in keep), *(["tokens", "seconds"] if costs else [])]
    lines = [" | ".join(head), " | ".join(["---"] + ["---:"] * (len(head) - 1))]
    for name, by_seed in rows.items():
        cells = [interval(column) for column in zip(*by_seed, strict=True)]
        lines.append(" | ".join([name, *cells, *([str(costs[name])] if costs else [])]))
    return "\n".join(f"| {line} |" for line in lines)


def written(path: Path, text: str, name: str) -> None:
    """Put `text` between the markers of a file."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, _, rest = path.read_text().partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f"{path} lacks the markers {begin} and {end}")
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}")


def experiment(
    asked: argparse.Namespace, checkpoints: Path, seed: int, overrides: Sequence[str]
) -> Experiment:
    """The settings of one method; greedy goes down to the smallest keep_n once for all."""
    return checked(
        [
            f"profile.seed={seed}", f"marginal.seed={seed}", f"eval.seed={seed}",
            f"pruning.seed={seed}", f"compensation.seed={seed}",
            f"marginal.rounds={n_experts(asked.settings) - min(asked.keep)}",
            f"eval.seq_lens=[{asked.seq_len}]", f"gate.seq_lens=[{asked.seq_len}]",
            f"eval.num_blocks={asked.blocks}", f"runtime.checkpoint_dir={checkpoints}", *overrides,
            *asked.settings,
        ]
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> dict[str, list[list[float]]]:
    """Change of PPL in % by method, seed and keep_n."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("settings", nargs="*")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--keep", type=int, nargs="+", default=[28, 24, 20, 16])
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME"
    )
    parser.add_argument("--store", type=Path)
    parser.add_argument("--write", type=Path)
    asked = parser.parse_args(arguments)
    methods = {name: METHODS[name] for name in METHODS if name in (REFERENCE, *asked.methods)}
    with tempfile.TemporaryDirectory() as temporary:
        home = asked.store or Path(temporary)
        resident = Resident()
        rows: dict[str, list[list[float]]] = {name: [] for name in methods}
        costs: dict[str, Cost] = {}
        for seed in asked.seeds:
            made = {
                name: experiment(asked, home / "checkpoints", seed, how)
                for name, how in methods.items()
            }
            first = made[REFERENCE]
            if first.runtime.threads:
                torch.set_num_threads(first.runtime.threads)
            place = session(first, home, resident)
            base = place.base()
            nll = mean_nll(place, base, base, None, evaluation_request(place))
            print(f"seed {seed}: base PPL {math.exp(nll):.4f}", flush=True)
            for name, settings in made.items():
                found, cost = losses(replace(place, experiment=settings), base, asked.keep, nll)
                rows[name].append(found)
                costs.setdefault(name, cost)  # of the first seed
                print(f"{name:<40}", *(f"{x:+8.2f}" for x in found), f"  {cost}", flush=True)
    apart = {
        name: [
            [a - b for a, b in zip(mine, theirs, strict=True)]
            for mine, theirs in zip(by_seed, rows[REFERENCE], strict=True)
        ]
        for name, by_seed in rows.items()
        if name != REFERENCE
    }
    text = "\n\n".join(
        [
            table(asked.keep, rows, costs),
            f"Differences to {REFERENCE} in points, paired by seed:",
            table(asked.keep, apart, None),
        ]
    )
    print(text)
    if asked.write:
        written(asked.write, text, "methods")
    return rows


if __name__ == "__main__":
    main()
