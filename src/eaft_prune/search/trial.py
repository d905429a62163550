"""One trial: its plan, evaluated chunk by chunk, or taken from the trial that had it first."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import optuna
from optuna.trial import FrozenTrial, TrialState

from eaft_prune.core.types import KeepPlan
from eaft_prune.search.objectives import measured, running_dnll
from eaft_prune.search.problem import Problem, cut
from eaft_prune.search.space import settings_of
from eaft_prune.search.stopping import behind
from eaft_prune.search.trials import finished, incumbent


@dataclass(frozen=True)
class Ended:
    """How a trial ended: what the study is told of it, and what people are shown."""

    state: TrialState
    values: Sequence[float] | None  # None: stopped early
    how: str
    shown: Mapping[str, float]


def evaluate_trial(problem: Problem, study: optuna.Study, trial: optuna.Trial) -> Ended:
    """Evaluate one point; what it reports on the way goes to the study at once."""
    experiment = problem.session.experiment
    plan = cut(problem, settings_of(experiment.pruning, trial.params))
    earlier = _same_plan(problem, study, plan)
    trial.set_user_attr("plan", plan.digest)
    if earlier is not None:
        return _repeat(problem, trial, earlier)
    # not of a repeat: of equal trials the first is the winner
    trial.set_user_attr("kept", json.dumps(plan.kept))
    trial.set_user_attr("n_experts", plan.n_experts)
    if problem.settings.objectives == ("dnll",):
        stopped = _evaluate_in_chunks(problem, study, trial, plan)
        if stopped is not None:
            return stopped
    found = measured(problem, plan, experiment.gate)
    _constrain(trial, found.constraints)
    trial.set_user_attr("hopeless", found.hopeless)
    values = [found.values[name] for name in problem.settings.objectives]
    shown = {**found.values, "violation": max(found.constraints.values())}
    return Ended(TrialState.COMPLETE, values, "evaluated", shown)


def _evaluate_in_chunks(
    problem: Problem, study: optuna.Study, trial: optuna.Trial, plan: KeepPlan
) -> Ended | None:
    """Report after each chunk; None if nobody stopped the trial before its last one."""
    settings = problem.settings
    best = incumbent(study) if settings.early_stop else None
    for done, value in enumerate(running_dnll(problem, plan), start=1):
        trial.report(value, done)
        if done == len(problem.chunks):
            break
        if trial.should_prune() or (
            best is not None and behind(problem, plan, best, done, settings.early_stop_confidence)
        ):
            partial = measured(problem, plan, problem.session.experiment.gate, done)
            _constrain(trial, partial.constraints)
            how = f"stopped after {done} of {len(problem.chunks)} chunks"
            return Ended(TrialState.PRUNED, None, how, {"dnll": value})
    return None


def _repeat(problem: Problem, trial: optuna.Trial, earlier: FrozenTrial) -> Ended:
    """What an earlier trial with the same plan found."""
    for step, value in earlier.intermediate_values.items():
        trial.report(value, step)
    _constrain(trial, earlier.constraints)
    trial.set_user_attr("hopeless", earlier.user_attrs.get("hopeless", False))
    how = f"same plan as trial {earlier.number}"
    if earlier.state == TrialState.PRUNED:
        last = earlier.intermediate_values[max(earlier.intermediate_values)]
        return Ended(TrialState.PRUNED, None, how, {"dnll": last})
    shown = dict(zip(problem.settings.objectives, earlier.values, strict=True))
    return Ended(TrialState.COMPLETE, earlier.values, how, shown)


def _same_plan(problem: Problem, study: optuna.Study, plan: KeepPlan) -> FrozenTrial | None:
    settings = problem.settings
    stopping = settings.early_stop or settings.pruner is not None
    for trial in finished(study):
        if trial.user_attrs.get("plan") == plan.digest and (
            stopping or trial.state == TrialState.COMPLETE
        ):
            return trial
    return None


def _constrain(trial: optuna.Trial, constraints: Mapping[str, float]) -> None:
    """Tell Optuna of the gate: <= 0 holds; of a stopped trial on the blocks it has seen."""
    for name, value in constraints.items():
        trial.set_constraint(name, value)
