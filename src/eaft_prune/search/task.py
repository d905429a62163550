"""The task: check the space, search, export the winner and gate it on other blocks."""

from __future__ import annotations

import json
import logging
import shlex
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna

from eaft_prune.core.outcome import Outcome, Selection
from eaft_prune.core.types import UserError
from eaft_prune.pipeline.arrow import Origin, check_padding, check_target, judge
from eaft_prune.pipeline.evaluation import Side
from eaft_prune.pipeline.export import write
from eaft_prune.pipeline.requests import evaluating
from eaft_prune.pipeline.sequential import measure_all
from eaft_prune.pipeline.session import Session
from eaft_prune.report import facts_text
from eaft_prune.search.problem import Problem, open_problem
from eaft_prune.search.record import write_trials
from eaft_prune.search.space import check_space, distributions, settings_of
from eaft_prune.search.study import make_pruner, make_sampler, open_study
from eaft_prune.search.trials import distinct_plans, failed, finished, plan_of, winner
from eaft_prune.search.workers import run_workers
from eaft_prune.stages.score import score

log = logging.getLogger(__name__)


def run(session: Session, out: Path) -> Outcome:
    """Search, then export the winner and gate it on evaluation rows the search never saw."""
    settings, pruning = session.experiment.search, session.experiment.pruning
    assert settings is not None, "config requires search settings for task=search"
    base = session.base()
    check_space(pruning, distributions(settings, pruning), base)
    check_padding(session, base)
    make_sampler(settings, 0)
    make_pruner(settings)
    for request in evaluating(
        session.experiment
    ):  # what the winner is gated on: rows may be too few
        session.blocks(base, request)
    check_target(session, base)
    problem = open_problem(session, base)
    study = open_study(problem)
    before = len(finished(study))
    started = time.perf_counter()
    run_workers(problem, study)
    seconds = time.perf_counter() - started
    write_trials(session, out, study)
    for trial in failed(study):
        log.warning("trial %d failed: %s", trial.number, trial.user_attrs["error"])
    best = winner(study)
    if best is None:
        raise UserError("no trial was finished: nothing to export (see the trials' errors above)")
    selection = _selected(problem, best)
    session.observer.plan(selection.plan)
    pruned = write(session, base, selection)
    facts = {
        **_facts(problem, study, best),
        "trials_now": len(finished(study)) - before,
        "search_seconds": round(seconds, 2),
    }
    found = measure_all(session, base, [Side(m.label, m) for m in (base, pruned)])
    origin = Origin(selection, base.checkpoint, pruned.checkpoint, facts)
    return replace(judge(session, out, found, origin), text=_text(facts))


def _text(facts: Mapping[str, Any]) -> str:
    """The facts for people; the winner's settings as overrides, to be pasted into a shell."""
    told = {name: value for name, value in facts.items() if name != "best_settings"}
    overrides = [f"{name}={_as_override(v)}" for name, v in facts["best_settings"].items()]
    return f"{facts_text(told)}\n{'best settings':<24} {shlex.join(overrides)}"


def _as_override(value: Any) -> str:
    """A number, a name, true, false or null as Hydra reads it."""
    return value if isinstance(value, str) else json.dumps(value)


def _selected(problem: Problem, best: optuna.trial.FrozenTrial) -> Selection:
    """The winner's plan, and the settings and scores it was made with."""
    pruning = settings_of(problem.session.experiment.pruning, best.params)
    return Selection(
        pruning.name, score(pruning, problem.trace), plan_of(best), pruning.model_dump(mode="json")
    )


def _facts(problem: Problem, study: optuna.Study, best: optuna.trial.FrozenTrial) -> dict[str, Any]:
    done = finished(study)
    return {
        "study": study.study_name,
        "trials": len(done),
        "trials_stopped": sum(trial.state.name == "PRUNED" for trial in done),
        "trials_failed": len(failed(study)),
        "distinct_plans": distinct_plans(study),
        "best_trial": best.number,
        "best_settings": dict(best.params),
        "best_values": dict(zip(problem.settings.objectives, best.values, strict=True)),
    }
