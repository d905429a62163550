"""Several processes on one study."""

from __future__ import annotations

import logging
import multiprocessing
from typing import Any

import optuna

from eaft_prune.config import Experiment, resolve_path
from eaft_prune.core.progress import Bars
from eaft_prune.core.store import Store
from eaft_prune.pipeline.session import Resident, Session
from eaft_prune.search.loop import work
from eaft_prune.search.problem import Problem, open_problem
from eaft_prune.search.study import open_study
from eaft_prune.tracking import MlflowRun, prepare


def run_workers(problem: Problem, study: optuna.Study) -> None:
    """Work until the study is full, beside workers - 1 further processes."""
    session = problem.session
    others = [
        multiprocessing.get_context("spawn").Process(
            target=_worker,
            args=(session.experiment.model_dump(), session.observer.run_id),
            daemon=True,
        )
        for _ in range(1, problem.settings.workers)
    ]
    for process in others:
        process.start()
    try:
        work(problem, study)
        for process in others:
            process.join()
    finally:
        for process in others:
            process.terminate()
    broken = [process.exitcode for process in others if process.exitcode]
    if broken:
        raise RuntimeError(f"{len(broken)} search workers ended with exit codes {broken}")


def _worker(values: dict[str, Any], run_id: str) -> None:
    """A further process on the same study, store and MLflow run."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    experiment = Experiment.model_validate(values)
    tracked = MlflowRun(prepare(experiment.tracking), run_id, experiment)
    store = Store(resolve_path(experiment.runtime.store_dir))
    session = Session(experiment, store, tracked, Bars(False), Resident())
    problem = open_problem(session, session.base())
    work(problem, open_study(problem))
