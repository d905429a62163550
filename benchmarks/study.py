"""The study: every way to choose experts x models x how many go, with intervals.

    python benchmarks/study.py --out DIR --models demo NAME=CHECKPOINT ... [--seeds 0 1 2 3 4]
        [--dropped 0.125 0.25 0.375] [--methods NAME ...] [--weights] [--store DIR]
        [-- SETTING=VALUE ...]

For every seed (profile.seed, marginal.seed, pruning.seed, compensation.seed) each method chooses
the experts to keep; each plan is evaluated masked, a repaired one as a written checkpoint, on
the same UNION blocks of rows that no method saw. --weights adds EAFT-REAP with other weights of
its regions and other quantiles. DIR/NAME.json gets every number, beside what other methods left
there before; `study_tables.py` makes the tables. Intervals: two sources of chance, the rows that a
method was calibrated on (seeds) and those it was judged on (conversations), added as variances.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from methods import METHODS, RAGGED, evaluation_request, tokens_of
from numpy.typing import NDArray
from runs import n_experts, session, settings

from eaft_prune.checkpoints.model import Model
from eaft_prune.config import Experiment
from eaft_prune.core.types import KeepPlan, TokenScores, Trace
from eaft_prune.maths.formulas import cc_rate
from eaft_prune.maths.intervals import ratio_variance, student
from eaft_prune.pipeline.criterion import select
from eaft_prune.pipeline.evaluation import Side, measure
from eaft_prune.pipeline.export import write
from eaft_prune.pipeline.session import Resident, Session
from eaft_prune.pipeline.traces import trace_of
from eaft_prune.stages.plan import plan
from eaft_prune.stages.score import Masses, mass_key, masses, score_from

UNIFORM = "REAP sum"
REFERENCES = (UNIFORM, "REAP mean", "EAFT-REAP")
CONFLICT = (-32.0, -8.0, -4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0)
UNCERTAIN = (0.0, 0.25, 0.5, 1.0)
QUANTILES = (0.3, 0.5)  # what counts as sure, and as wrong: more tokens are conflicts
Z = 1.96

Values = NDArray[np.float64]


@dataclass
class Place:
    """One model, and what was found of it so far."""

    session: Session
    base: Model
    row_T: NDArray[np.int64]  # conversation of every scored token
    base_nll_T: Values
    losses: dict[str, tuple[Values, float]] = field(default_factory=dict)  # by plan and weights

    def loss(self, label: str, model: Model, mask: KeepPlan | None) -> tuple[Values, float]:
        """Nats that every conversation loses, and the CC rate."""
        if label not in self.losses:
            scores = scored(self.session, self.base, Side("candidate", model, mask))
            lost_T = -scores.logp_T.astype(np.float64) - self.base_nll_T
            lost_C: Values = np.bincount(self.row_T, lost_T).astype(np.float64)
            self.losses[label] = lost_C, rate(scores)
        return self.losses[label]


@dataclass
class Calibration:
    """What one seed's profile gives: criteria that look at the same masses share them."""

    trace: Trace
    held: dict[tuple[str | float, ...], Masses] = field(default_factory=dict)

    def plan(self, experiment: Experiment) -> KeepPlan:
        """Stages score and plan."""
        pruning = experiment.pruning
        key = mass_key(pruning)
        if key not in self.held:
            self.held[key] = masses(pruning, self.trace)
        return plan(pruning, score_from(pruning, self.held[key]))


def scored(place: Session, base: Model, side: Side) -> TokenScores:
    """On the evaluation blocks."""
    request = evaluation_request(place)
    found = measure(place, base, side, [request])
    return next(iter(found.scores.values()))


def evaluated(working: Session) -> tuple[Place, TokenScores]:
    """The whole model on the evaluation blocks."""
    base = working.base()
    blocks = working.blocks(base, evaluation_request(working)).value
    row_T = np.unique(blocks.conversation_BS[blocks.scored_BS], return_inverse=True)[1]
    scores = scored(working, base, Side("base", base))
    return Place(working, base, row_T, -scores.logp_T.astype(np.float64)), scores


def rate(scores: TokenScores) -> float:
    """Share of confident conflicts by the model's own quantiles."""
    return float(cc_rate(scores.p_T, scores.entropy_T, 0.15))


def weightings() -> dict[str, dict[str, float]]:
    """EAFT-REAP, told otherwise."""
    grid = {
        f"w_conflict {c:g}, w_uncertain {u:g}": {"w_conflict": c, "w_uncertain": u}
        for c in CONFLICT
        for u in UNCERTAIN
    }
    wide = {
        f"quantile {q:g}, w_conflict {c:g}": {"quantile": q, "w_conflict": c}
        for q in QUANTILES
        for c in (-2.0, 0.0)
    }
    return grid | wide


def seeded(experiment: Experiment, seed: int, keep_n: int) -> Experiment:
    """The same experiment with other rows, at one size."""
    rooms = {
        room: getattr(experiment, room).model_copy(update={"seed": seed})
        for room in ("profile", "marginal", "compensation")
    }
    pruning = experiment.pruning.model_copy(update={"seed": seed, "keep_n": keep_n})
    return experiment.model_copy(update={**rooms, "pruning": pruning})


def interval(loss_SC: Values, tokens_C: NDArray[np.int64]) -> dict[str, float]:
    """Mean loss in nats a token over seeds and conversations, and the reach of its 95% interval.

    reach^2 = (t s / sqrt(S))^2 + (1.96 e)^2: s the spread of the S seeds' means, e the error of
    the seeds' mean as a ratio over conversations.
    """
    n, total = len(loss_SC), int(tokens_C.sum())
    of_seed_S = loss_SC.sum(axis=1) / total
    mean, variance = ratio_variance(loss_SC.mean(axis=0), tokens_C)
    rows = Z * float(np.sqrt(variance)) / total
    seeds = float(student(0.975, n) * of_seed_S.std(ddof=1) / np.sqrt(n)) if n > 1 else 0.0
    found = {"mean": float(mean), "reach": float(np.hypot(rows, seeds)), "seeds": seeds}
    return {name: round(value, 6) for name, value in found.items()}


def study(
    name: str, asked: argparse.Namespace, made: dict[str, Experiment], home: Path
) -> dict[str, Any]:
    """Every number of one model."""
    first = next(iter(made.values()))
    working = session(first, home, Resident())
    place, scores = evaluated(working)
    base, tokens_C = place.base, np.bincount(place.row_T)
    keep = [round(base.n_experts * (1 - share)) for share in asked.dropped]
    lost: dict[tuple[str, int], list[Values]] = {}
    uniform: dict[tuple[int, int], KeepPlan] = {}  # REAP sum's, by seed and size
    plans: list[dict[str, Any]] = []
    shares: list[dict[str, float]] = []
    for seed in asked.seeds:
        profiled = replace(working, experiment=seeded(first, seed, keep[0]))
        calibration = Calibration(trace_of(profiled, base).value)
        shares.append(region_shares(calibration, made["EAFT-REAP"], keep[0]))
        for method, experiment in made.items():
            for keep_n in keep:
                at = replace(working, experiment=seeded(experiment, seed, keep_n), records=[])
                loss_C, cc, kept = candidate(place, at, calibration)
                lost.setdefault((method, keep_n), []).append(loss_C)
                if method == UNIFORM:
                    uniform[seed, keep_n] = kept
                plans.append(
                    {
                        "method": method, "seed": seed, "keep_n": keep_n, "plan": kept.digest[:12],
                        "dnll": round(loss_C.sum() / tokens_C.sum(), 6), "cc_rate": round(cc, 7),
                        "tokens": sum(tokens_of(r) for r in at.records if "marginal" in r.stage),
                        "moved": moved(kept, uniform[seed, keep_n]),
                    }
                )  # fmt: skip
            print(
                f"{name} seed {seed} {method:<34}",
                *(f"{100 * np.expm1(one['dnll']):+8.2f}" for one in plans[-len(keep) :]),
                flush=True,
            )
    return {
        "model": name, "experts": base.n_experts, "top_k": base.top_k, "layers": base.n_layers,
        "seeds": asked.seeds, "keep": keep, "conversations": len(tokens_C),
        "scored_tokens": int(tokens_C.sum()), "model_digest": base.digest,
        "base": {
            "ppl": float(np.exp(place.base_nll_T.mean())), "cc_rate": rate(scores),
            "mean_p": float(scores.p_T.mean()), "mean_h": float(scores.entropy_T.mean()),
        },
        "profiled_shares": shares,
        "plans": plans,
        "apart": list(differences(lost, tokens_C)),
    }  # fmt: skip


def differences(
    lost: dict[tuple[str, int], list[Values]], tokens_C: NDArray[np.int64]
) -> Iterator[dict[str, Any]]:
    """Of every method and size to the whole model (reference null) and to each reference."""
    for (method, keep_n), losses in lost.items():
        loss_SC = np.stack(losses)
        against: dict[str | None, Values] = {None: np.zeros_like(loss_SC)}
        for name in REFERENCES:
            if name != method:
                against[name] = np.stack(lost[name, keep_n])
        for reference, other_SC in against.items():
            found = interval(loss_SC - other_SC, tokens_C)
            yield {"method": method, "keep_n": keep_n, "reference": reference, **found}


def moved(one: KeepPlan, other: KeepPlan) -> int:
    """Experts that the one keeps and the other does not."""
    return sum(len(set(a) - set(b)) for a, b in zip(one.kept, other.kept, strict=True))


def region_shares(calibration: Calibration, eaft: Experiment, keep_n: int) -> dict[str, float]:
    """Of the profiled tokens, by EAFT-REAP's regions."""
    calibration.plan(seeded(eaft, 0, keep_n))
    tokens = calibration.held[mass_key(eaft.pruning)].region_tokens
    return {region: count / sum(tokens.values()) for region, count in tokens.items()}


def candidate(
    place: Place, at: Session, calibration: Calibration
) -> tuple[Values, float, KeepPlan]:
    """What one plan loses, and the plan."""
    pruning = at.experiment.pruning
    if pruning.compensation != "none":
        selection = select(at, place.base)
        label = f"{selection.plan.digest} {pruning.compensation} {at.experiment.compensation.seed}"
        written = write(at, place.base, selection)
        return *place.loss(label, written, None), selection.plan
    if pruning.measured or pruning.selection != "uniform":
        kept = select(at, place.base).plan
    else:
        kept = calibration.plan(at.experiment)
    return *place.loss(kept.digest, place.base, kept), kept


def experiments(
    model: Sequence[str], asked: argparse.Namespace, home: Path
) -> dict[str, Experiment]:
    """The checked settings of every method; greedy goes down to the smallest size once for all."""
    common = [
        *model, "runtime.progress=false", f"runtime.checkpoint_dir={home / 'checkpoints'}",
        f"eval.seq_lens=[{asked.seq_len}]", f"gate.seq_lens=[{asked.seq_len}]", "eval.seed=0",
        f"eval.num_blocks={asked.blocks}", *asked.settings,
    ]  # fmt: skip
    experts = n_experts(common)
    common.append(f"marginal.rounds={round(experts * max(asked.dropped))}")
    smallest = [f"pruning.min_keep_n={experts // 4}"]
    made = {
        name: settings([*common, *how, *(smallest if set(RAGGED) <= set(how) else [])])
        for name, how in {UNIFORM: METHODS[UNIFORM], **METHODS}.items()  # it first
        if name in (*REFERENCES, *asked.methods)
    }
    eaft = made["EAFT-REAP"]
    for name, weights in weightings().items() if asked.weights else ():
        pruning = eaft.pruning.model_copy(update=weights)
        made[name] = eaft.model_copy(update={"pruning": pruning})
    return made


def joined(path: Path, found: dict[str, Any]) -> dict[str, Any]:
    """With what a file says of methods that were not asked for now, if all else is the same."""
    if not path.exists():
        return found
    before = json.loads(path.read_text())
    lists = ("plans", "apart")
    same = {key: value for key, value in found.items() if key not in lists}
    if {key: value for key, value in before.items() if key not in lists} != same:
        raise SystemExit(f"{path} is of another model, or of other seeds or sizes: move it away")
    new = {one["method"] for one in found["plans"]}
    old = {key: [one for one in before[key] if one["method"] not in new] for key in lists}
    return found | {key: old[key] + found[key] for key in lists}


def main(arguments: Sequence[str] | None = None) -> None:
    """Write a JSON file a model."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("settings", nargs="*")
    parser.add_argument("--models", nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--dropped", type=float, nargs="+", default=[0.125, 0.25, 0.375])
    parser.add_argument("--blocks", default="all")
    parser.add_argument("--seq-len", type=int, default=1024)
    masked = [name for name in METHODS if not name.endswith("repaired")]
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=masked, metavar="NAME")
    parser.add_argument("--weights", action="store_true")
    parser.add_argument("--store", type=Path)
    asked = parser.parse_args(arguments)
    asked.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        home = asked.store or Path(temporary)
        for model in asked.models:
            name, _, path = model.partition("=")
            named = ["model=local", f"model.path={path}"] if path else []
            found = study(name, asked, experiments(named, asked, home), home)
            text = json.dumps(joined(asked.out / f"{name}.json", found), indent=None)
            (asked.out / f"{name}.json").write_text(text)


if __name__ == "__main__":
    main()
