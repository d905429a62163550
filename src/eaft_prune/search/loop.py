"""Ask, evaluate, tell."""

from __future__ import annotations

import logging
import multiprocessing
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta

import optuna
from filelock import FileLock
from optuna.trial import TrialState

from eaft_prune.core.digests import digest
from eaft_prune.core.provenance import is_dead, process_tags
from eaft_prune.search.problem import Problem
from eaft_prune.search.space import distributions
from eaft_prune.search.study import make_sampler
from eaft_prune.search.trial import evaluate_trial

log = logging.getLogger(__name__)

_FAILURES_IN_A_ROW = 5  # then the search ends: it is not the trials' settings
_WAIT_SECONDS = 0.5
_SILENT = timedelta(hours=1)  # a running trial of another host that is older is not waited for


def work(problem: Problem, study: optuna.Study) -> None:
    """Ask, evaluate, tell, until the study holds n_trials finished trials.

    A trial that raises is marked FAIL and the next one is asked; several in a row end the search.
    Other processes' last trials are waited for, so that all name the same winner.
    """
    failures = 0
    while True:
        trial, running = _ask(problem, study)
        if trial is None and running == 0:
            return
        if trial is None:
            time.sleep(_WAIT_SECONDS)
            continue
        started = time.perf_counter()
        try:
            ended = evaluate_trial(problem, study, trial)
            _tell(problem, study, trial, ended.state, ended.values)
            how, shown, failures = ended.how, ended.shown, 0
        except (Exception, SystemExit) as error:
            failures += 1
            how, shown = f"failed: {type(error).__name__}: {error}".splitlines()[0], {}
            trial.set_user_attr("error", how.removeprefix("failed: "))
            _tell(problem, study, trial, TrialState.FAIL)
            if failures == _FAILURES_IN_A_ROW:
                raise
        except BaseException:
            _tell(problem, study, trial, TrialState.FAIL)
            raise
        _announce(problem, trial, how, shown, time.perf_counter() - started)


def _ask(problem: Problem, study: optuna.Study) -> tuple[optuna.Trial | None, int]:
    """The next trial, or None when n_trials are finished or running; and how many are running."""
    settings, experiment = problem.settings, problem.session.experiment
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        return None, 0  # the search was killed: a worker does not go on by itself
    # asked under a lock, so that workers on one store do not start more trials than are wanted
    with FileLock(problem.session.store.root / f"search-{digest(study.study_name)[:16]}.lock"):
        running = 0
        seen = study.get_trials(deepcopy=False)  # read once: others may end a trial meanwhile
        ended = [other for other in seen if other.state.is_finished()]
        for other in seen:
            if other.state.is_finished():
                continue
            # the lock is held: a trial without its process's name was asked by one that died since
            process = other.user_attrs.get("process")
            if process is None or is_dead(process):
                study.tell(other.number, state=TrialState.FAIL, skip_if_finished=True)
            elif other.datetime_start and datetime.now() - other.datetime_start < _SILENT:
                running += 1
        known = sum(other.state != TrialState.FAIL for other in ended) + running
        raised = sum("error" in other.user_attrs for other in ended)
        exhausted = study.user_attrs.get("exhausted") == settings.sampler.model_dump_json()
        if known >= settings.n_trials or exhausted:
            return None, running
        study.sampler = make_sampler(settings, known + raised)
        trial = study.ask(distributions(settings, experiment.pruning))
        trial.set_user_attr("process", process_tags())
        return trial, running


def _tell(
    problem: Problem,
    study: optuna.Study,
    trial: optuna.Trial,
    state: TrialState,
    values: Sequence[float] | None = None,
) -> None:
    try:
        # Ctrl-C may come between a trial's end and here
        study.tell(trial, values, state=state, skip_if_finished=True)
    except RuntimeError as error:
        # a sampler that has asked for all there is (a grid) stops the study, once told
        if "Study.stop" not in str(error):
            raise
        study.set_user_attr("exhausted", problem.settings.sampler.model_dump_json())


def _announce(
    problem: Problem, trial: optuna.Trial, how: str, shown: Mapping[str, float], seconds: float
) -> None:
    """One line on the console, one child run."""
    figures = "  ".join(f"{name} {value:.5g}" for name, value in shown.items())
    log.info("trial %-4d %-36s %6.2f s  %s", trial.number, how, seconds, figures)
    problem.session.observer.point(
        f"trial {trial.number}",
        trial.params,
        {**shown, "seconds": seconds},
        {"plan.digest": trial.user_attrs.get("plan", ""), "trial.outcome": how},
    )
