"""Checks of the measurement itself, and of what it stands on."""

from __future__ import annotations

import math
from pathlib import Path

from eaft_prune.checks.io_probe import io_probe
from eaft_prune.config import resolve_path
from eaft_prune.core.outcome import Outcome
from eaft_prune.core.types import KeepPlan
from eaft_prune.pipeline import harness
from eaft_prune.pipeline.arrow import Origin, check_plan_fits, judge, open_base
from eaft_prune.pipeline.evaluation import Side
from eaft_prune.pipeline.export import write_plan
from eaft_prune.pipeline.generation import generated
from eaft_prune.pipeline.requests import comparing_experts
from eaft_prune.pipeline.sequential import measure_all
from eaft_prune.pipeline.session import Session
from eaft_prune.report import facts_text
from eaft_prune.stages import export


def run_noise_floor(session: Session, out: Path) -> Outcome:
    """The base model evaluated twice: what the gate reads when nothing changed."""
    base = open_base(session)
    tasks = harness.asked(session, base)
    sides = [Side("base", base), Side("repeat", base, replicate=1)]
    found = measure_all(session, base, sides)
    origin = Origin(
        base=base.checkpoint,
        generated=generated(session, base, sides),
        tasks=harness.answered(session, sides, tasks),
    )
    return judge(session, out, found, origin)


def run_noop(session: Session, out: Path) -> Outcome:
    """Rewrite with every expert kept: bytes must be equal and the gate must pass."""
    base = open_base(session)
    tasks = harness.asked(session, base)
    plan = KeepPlan((tuple(range(base.n_experts)),) * base.n_layers, base.n_experts)
    session.observer.plan(plan)
    model = write_plan(session, base, plan, {"criterion": "keep all"})
    same = export.identical_tensors(base.files, model.files)
    sides = [Side("base", base), Side("pruned", model)]
    found = measure_all(session, base, sides)
    origin = Origin(
        base=base.checkpoint,
        pruned=model.checkpoint,
        facts={"identical_tensors": same},
        generated=generated(session, base, sides),
        tasks=harness.answered(session, sides, tasks),
    )
    return judge(session, out, found, origin)


def run_expert_math(session: Session, out: Path) -> Outcome:
    """Our experts against transformers' eager loop and against float64, layer by layer."""
    from eaft_prune.checks.expert_math import TOLERANCE, expert_math  # torch: not at the start

    base = session.base()
    blocks = session.blocks(base, comparing_experts(session.experiment)).value
    engine = session.local_engine(base)
    facts, limit = expert_math(engine, blocks), TOLERANCE[engine.dtype]
    worst = max(facts, key=lambda name: math.inf if math.isnan(facts[name]) else facts[name])
    passed = facts[worst] <= limit
    text = (
        f"{facts_text(facts)}\n\n{'PASS' if passed else 'FAIL'}  the largest relative error is "
        f"{facts[worst]:.2g} ({worst}), {'at most' if passed else 'more than'} the {limit:g} that "
        f"{engine.dtype} may differ by"
    )
    return Outcome(base=base.checkpoint, facts=facts, text=text, differs=not passed)


def run_io_probe(session: Session, out: Path) -> Outcome:
    """One layer written as an export would: bytes, seconds, memory, and an estimate for all."""
    base = session.base()
    check_plan_fits(session, base)
    settings = session.experiment
    total = base.files.weight_bytes // base.n_layers
    with session.bars.bar("io probe", total, "B") as on_bytes:
        facts = io_probe(
            base.family,
            base.files,
            settings.pruning.keep_n,
            settings.probe.layer,
            resolve_path(settings.runtime.checkpoint_dir),
            settings.export.max_shard_bytes,
            on_bytes,
        )
    return Outcome(base=base.checkpoint, facts=facts)
