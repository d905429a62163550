"""What the trials of a study say: which are finished, which hold the gate, which one wins."""

from __future__ import annotations

import json

import optuna
from optuna.trial import FrozenTrial, TrialState

from eaft_prune.core.types import KeepPlan


def finished(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that count as one of n_trials."""
    return _in(study, TrialState.COMPLETE, TrialState.PRUNED)


def complete(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that were measured on all blocks."""
    return _in(study, TrialState.COMPLETE)


def failed(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that raised; those of killed processes are not among them."""
    return [trial for trial in _in(study, TrialState.FAIL) if "error" in trial.user_attrs]


def distinct_plans(study: optuna.Study) -> int:
    """How many different keep plans the finished trials drew."""
    return len({trial.user_attrs["plan"] for trial in finished(study)})


def plan_of(trial: FrozenTrial) -> KeepPlan:
    """The keep plan of a trial that was the first to draw it."""
    kept = json.loads(trial.user_attrs["kept"])
    return KeepPlan(tuple(map(tuple, kept)), int(trial.user_attrs["n_experts"]))


def winner(study: optuna.Study) -> FrozenTrial | None:
    """The trial with the lowest objectives, compared in their order, of those that hold the gate's
    limits on the search blocks; with objectives keep_n, dnll: the fewest experts that hold.

    If none holds them: the lowest objective, or with several the least sum of violations. None if
    no trial is complete.
    """
    done = complete(study)
    holding = [trial for trial in done if _holds(trial)]
    if not holding and len(study.directions) > 1:
        return min(done, key=lambda t: (_violation(t), t.values, t.number), default=None)
    return min(holding or done, key=lambda t: (t.values, t.number), default=None)


def incumbent(study: optuna.Study) -> KeepPlan | None:
    """The plan whose losses nobody above can win with; None while there is no such plan.

    Whoever loses more than the best so far cannot win if that holds the gate's limits, nor if its
    perplexity alone breaks them. In between a worse loss could still hold them: nobody is stopped.
    """
    best = winner(study)
    if best is None or not (_holds(best) or best.user_attrs["hopeless"]):
        return None
    return plan_of(best)


def _in(study: optuna.Study, *states: TrialState) -> list[FrozenTrial]:
    found: list[FrozenTrial] = study.get_trials(deepcopy=False, states=states)
    return found


def _holds(trial: FrozenTrial) -> bool:
    return bool(max(trial.constraints.values()) <= 0)


def _violation(trial: FrozenTrial) -> float:
    return float(sum(max(value, 0.0) for value in trial.constraints.values()))
