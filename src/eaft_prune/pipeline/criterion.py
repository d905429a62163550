"""profile -> score -> plan; a measured loss, or a scores file, instead of profile and score."""

from __future__ import annotations

from typing import Any

from eaft_prune.checkpoints.model import Model
from eaft_prune.config import PLAN_SETTINGS, PruningSettings, resolve_path
from eaft_prune.core.digests import file_digest
from eaft_prune.core.outcome import Selection
from eaft_prune.core.plugins import source_digest
from eaft_prune.core.step import Step
from eaft_prune.core.store import Stored
from eaft_prune.core.types import Coverage, ExpertScores, KeepPlan, LayerLosses, Trace
from eaft_prune.pipeline.losses import layer_losses, marginal_scores
from eaft_prune.pipeline.session import Session
from eaft_prune.pipeline.traces import trace_of
from eaft_prune.records.scores import check_scores, read_scores
from eaft_prune.stages import coverage as covering
from eaft_prune.stages import plan as planning
from eaft_prune.stages import score as scoring


def select(session: Session, base: Model) -> Selection:
    """Scores, and the plan that is cut from them."""
    settings = session.experiment.pruning
    trace = _trace(session, base)
    scores = _scores(session, base, trace)
    inputs: dict[str, str] = {"scores": scores.digest}
    losses: Stored[LayerLosses] | None = None
    if settings.selection == "marginal_loss":
        losses = layer_losses(session, base, scores)
        inputs["losses"] = losses.digest
    plan = session.run(
        Step(
            "plan",
            planning.VERSION,
            settings.model_dump(include=set(PLAN_SETTINGS)),
            inputs,
            KeepPlan,
            lambda: planning.plan(
                settings, scores.value, None if losses is None else losses.value, base.groups
            ),
        )
    )
    session.observer.plan(plan.value)
    values = settings.model_dump(mode="json")
    covered = None if trace is None else _coverage(session, trace, plan)
    return Selection(settings.name, scores.value, plan.value, values, covered)


def _coverage(session: Session, trace: Stored[Trace], plan: Stored[KeepPlan]) -> Coverage:
    step = Step(
        "coverage",
        covering.VERSION,
        {},
        {"trace": trace.digest, "plan": plan.digest},
        Coverage,
        lambda: covering.coverage(trace.value, plan.value),
    )
    return session.run(step).value


def _trace(session: Session, base: Model) -> Stored[Trace] | None:
    """The routing trace; None where scores are not made of one."""
    given = session.experiment.scores is not None
    return None if given or session.experiment.pruning.measured else trace_of(session, base)


def scoring_settings(settings: PruningSettings) -> dict[str, Any]:
    """The settings that scores depend on, and the source of a function of the user's."""
    if settings.function is None:
        return settings.scoring
    source = source_digest("pruning.function", settings.function)
    return {**settings.scoring, "function_sha256": source}


def _scores(session: Session, base: Model, trace: Stored[Trace] | None) -> Stored[ExpertScores]:
    settings = session.experiment.pruning
    if session.experiment.scores is not None:
        return _given_scores(session, base, session.experiment.scores)
    if trace is None:
        return marginal_scores(session, base)
    return session.run(
        Step(
            "score",
            scoring.VERSION,
            scoring_settings(settings),
            {"trace": trace.digest},
            ExpertScores,
            lambda: scoring.score(settings, trace.value),
            lambda value, seconds: {f"{name}_tokens": n for name, n in value.region_tokens.items()},
        )
    )


def _given_scores(session: Session, base: Model, given: str) -> Stored[ExpertScores]:
    """The scores of a file as the output of stage score; raises UserError if they do not fit.

    Equal scores are equal bytes there, so the plan has the key that it has after a profile.
    """
    path = resolve_path(given)
    file = read_scores(path)
    check_scores(file, scoring_settings(session.experiment.pruning), base.digest)
    return session.run(
        Step(
            "score",
            scoring.VERSION,
            {},
            {"file": file_digest(path)},
            ExpertScores,
            lambda: file.scores,
        )
    )
