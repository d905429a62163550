"""What a pipeline run would have to evaluate, without doing it."""

from __future__ import annotations

from dataclasses import replace

from eaft_prune.core.digests import digest
from eaft_prune.core.types import UserError
from eaft_prune.pipeline.arrow import check_plan_fits
from eaft_prune.pipeline.criterion import select
from eaft_prune.pipeline.evaluation import Part, Side, evaluated, masked_model
from eaft_prune.pipeline.export import target_of
from eaft_prune.pipeline.requests import evaluating
from eaft_prune.pipeline.session import Session
from eaft_prune.stages import export


def preview(session: Session) -> tuple[str, dict[str, str]]:
    """The plan's digest, and the evaluations a pipeline run would have to make.

    They are keyed so that equal ones of several runs have equal keys; the base model is profiled if
    no run has done so yet, nothing is evaluated and nothing exported.
    """
    if session.experiment.eval.early_stop:
        raise UserError("how much eval.early_stop evaluates is not known before: set it to false")
    base = session.base()
    check_plan_fits(session, base)
    plan = select(session, base).plan
    exported = export.exported_digest(*target_of(session, base, plan))
    pruned = replace(base, digest=exported or "")
    sides = {
        "base": Side("base", base),
        "masked": Side("masked", masked_model(session, base)[0], plan),
        "pruned": Side("pruned", pruned),
    }
    missing: dict[str, str] = {}
    for name in ("base", *session.experiment.eval.candidates):
        unknown = name == "pruned" and exported is None
        for request in evaluating(session.experiment):
            blocks = session.blocks(base, request)
            where = f"{name} {request.pack} {request.seq_len}"
            step = evaluated(session, sides[name], Part(where, blocks))
            if unknown or not session.store.holds(step):
                missing[digest([dict(step.inputs), plan.digest if unknown else ""])] = where
    return plan.digest, missing
