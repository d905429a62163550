"""task=candidate: a checkpoint or a plan made elsewhere, against its base, by the same proof."""

from __future__ import annotations

from pathlib import Path

from eaft_prune.core.outcome import Outcome
from eaft_prune.pipeline.arrow import Origin, check_target, open_base, prove
from eaft_prune.pipeline.candidates import opened, plan_given
from eaft_prune.pipeline.evaluation import Side
from eaft_prune.pipeline.export import write_plan
from eaft_prune.pipeline.session import Session

_GB = 1e9


def run_candidate(session: Session, out: Path) -> Outcome:
    """candidate.path as it is, or the checkpoint that candidate.plan cuts from the base."""
    settings = session.experiment.candidate
    assert settings is not None, "config requires candidate.* for this task"
    base = open_base(session)
    if settings.path is not None:
        model = opened(session, base, settings.path, settings.name)
        session.observer.checkpoint("candidate", model.checkpoint)
    else:
        check_target(session, base)
        plan = plan_given(session, base, settings)
        session.observer.plan(plan)
        model = write_plan(session, base, plan, {"criterion": f"plan of {settings.name}"})
    sides = [Side("base", base), Side(settings.name, model)]
    facts = {
        "gb": model.files.weight_bytes / _GB,
        "gb_base": base.files.weight_bytes / _GB,
        "n_experts": model.n_experts,
        "n_experts_base": base.n_experts,
    }
    return prove(session, out, sides, Origin(None, base.checkpoint, model.checkpoint, facts))
