"""Optuna over pruning settings: the only module that imports optuna.

A study is resumable: n_trials counts finished trials, whoever ran them. Plans are evaluated masked,
chunk by chunk, and a plan that any trial has evaluated is never evaluated again.
"""

from __future__ import annotations

import csv
import inspect
import io
import json
import logging
import multiprocessing
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from eaft_prune.bench import Bench, Resident
from eaft_prune.config import (
    Experiment,
    PruningSettings,
    RangeSettings,
    SearchSettings,
    resolve_path,
)
from eaft_prune.fingerprint import digest
from eaft_prune.pipeline import Outcome, judge, measure, numerics, write
from eaft_prune.progress import Bars
from eaft_prune.result import write_atomically
from eaft_prune.stages.score import score
from eaft_prune.store import Store
from eaft_prune.tracking import MlflowRun, prepare
from eaft_prune.tracking.provenance import is_dead, process_tags
from eaft_prune.trials import (
    Problem,
    behind,
    measured,
    open_problem,
    plan_of,
    running_dnll,
    settings_of,
)
from eaft_prune.types import KeepPlan, Selection, UserError

if TYPE_CHECKING:
    import optuna

log = logging.getLogger(__name__)


def run_search(bench: Bench, out: Path) -> Outcome:
    """Search, then export the winner and gate it on evaluation rows the search never saw."""
    settings = _settings(bench.experiment)
    problem = open_problem(bench, settings)
    study = _study(problem, worker=0)
    for trial in study.get_trials(deepcopy=False):
        if not trial.state.is_finished() and is_dead(trial.user_attrs):
            study.tell(trial.number, state=_state("FAIL"))  # its process is gone
    before = len(_finished(study))
    started = time.perf_counter()
    _run_workers(problem, study)
    spent = time.perf_counter() - started
    best = _winner(study)
    plan, pruning = _plan(best), settings_of(bench.experiment.pruning, best.params)
    _write_trials(bench, out, study)
    finished = _finished(study)
    facts = {
        "study": study.study_name,
        "trials": len(finished),
        "trials_now": len(finished) - before,
        "trials_stopped": sum(t.state.name == "PRUNED" for t in finished),
        "distinct_plans": len({t.user_attrs["plan"] for t in finished}),
        "search_seconds": round(spent, 2),
        "best_trial": best.number,
        "best_settings": dict(best.params),
        "best_values": dict(zip(settings.objectives, best.values, strict=True)),
    }
    selection = Selection(pruning.name, score(pruning, problem.trace), plan)
    bench.observer.plan(plan)
    base = problem.base
    pruned = write(bench, base, selection)
    first = measure(bench, base, "base", base)
    second = measure(bench, pruned, "pruned", base)
    return judge(bench, out, first, [second], selection, base.checkpoint, pruned.checkpoint, facts)


def _run_workers(problem: Problem, study: optuna.Study) -> None:
    settings, bench = problem.settings, problem.bench
    others = [
        multiprocessing.get_context("spawn").Process(
            target=_worker,
            args=(bench.experiment.model_dump(), bench.observer.run_id, number),
            daemon=True,
        )
        for number in range(1, settings.workers)
    ]
    for process in others:
        process.start()
    try:
        _work(problem, study)
        for process in others:
            process.join()
    finally:
        for process in others:
            process.terminate()
    broken = [process.exitcode for process in others if process.exitcode]
    if broken:
        raise RuntimeError(f"{len(broken)} search workers ended with exit codes {broken}")


def _worker(values: dict[str, Any], run_id: str, number: int) -> None:
    """A further process on the same study, store and MLflow run."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    experiment = Experiment.model_validate(values)
    tracked = MlflowRun(prepare(experiment.tracking), run_id, experiment)
    store = Store(resolve_path(experiment.runtime.store_dir))
    bench = Bench(experiment, store, tracked, Bars(False), Resident())
    problem = open_problem(bench, _settings(experiment))
    _work(problem, _study(problem, worker=number))


def _work(problem: Problem, study: optuna.Study) -> None:
    """Ask, evaluate, tell, until the study holds n_trials finished trials."""
    while (trial := _ask(problem, study)) is not None:
        started = time.perf_counter()
        try:
            how, values = _run_trial(problem, study, trial)
        except BaseException:
            study.tell(trial, state=_state("FAIL"))
            raise
        seconds = time.perf_counter() - started
        shown = "  ".join(f"{name} {value:+.5f}" for name, value in values.items())
        log.info("trial %-4d %-36s %5.1f s  %s", trial.number, how, seconds, shown)
        problem.bench.observer.point(
            f"trial {trial.number}",
            trial.params,
            {**values, "seconds": seconds},
            {"plan.digest": trial.user_attrs["plan"], "trial.outcome": how},
        )


def _ask(problem: Problem, study: optuna.Study) -> optuna.Trial | None:
    # asked under a lock, so that workers on one store do not start more trials than are wanted
    with FileLock(problem.bench.store.root / f"search-{digest(study.study_name)[:16]}.lock"):
        trials = study.get_trials(deepcopy=False)
        running = sum(not t.state.is_finished() and not is_dead(t.user_attrs) for t in trials)
        if len(_finished(study)) + running >= problem.settings.n_trials:
            return None
        trial = study.ask()
        for name, value in process_tags().items():
            trial.set_user_attr(name, value)
        return trial


def _run_trial(
    problem: Problem, study: optuna.Study, trial: optuna.Trial
) -> tuple[str, dict[str, float]]:
    """Evaluate one point and tell the study; returns how it ended and what was seen."""
    settings = problem.settings
    pruning = problem.bench.experiment.pruning
    chosen = {name: _suggest(trial, name, space) for name, space in settings.space.items()}
    plan = plan_of(problem, settings_of(pruning, chosen))
    earlier = _same_plan(study, plan)
    trial.set_user_attr("plan", plan.digest)
    trial.set_user_attr("kept", json.dumps(plan.kept))
    trial.set_user_attr("n_experts", plan.n_experts)
    if earlier is not None:
        return f"same plan as trial {earlier.number}", _repeat(study, trial, earlier)
    if settings.objectives == ("dnll",) and settings.stop_confidence is not None:
        best = _incumbent(study)
        for done, value in enumerate(running_dnll(problem, plan), start=1):
            trial.report(value, done)
            if done == len(problem.chunks) or best is None:
                continue
            if behind(problem, plan, best, done, settings.stop_confidence):
                study.tell(trial, state=_state("PRUNED"))
                return f"stopped after {done} of {len(problem.chunks)} chunks", {"dnll": value}
    found = measured(problem, plan, problem.bench.experiment.gate)
    trial.set_user_attr("constraints", list(found.constraints))
    study.tell(trial, [found.values[name] for name in settings.objectives])
    return "evaluated", {**found.values, "violation": max(found.constraints)}


def _repeat(
    study: optuna.Study, trial: optuna.Trial, earlier: optuna.trial.FrozenTrial
) -> dict[str, float]:
    """Tell a trial what an earlier one with the same plan found."""
    for step, value in earlier.intermediate_values.items():
        trial.report(value, step)
    if "constraints" in earlier.user_attrs:
        trial.set_user_attr("constraints", earlier.user_attrs["constraints"])
    if earlier.state.name == "PRUNED":
        study.tell(trial, state=earlier.state)
        return {"dnll": list(earlier.intermediate_values.values())[-1]}
    study.tell(trial, earlier.values)
    return dict(zip(study.user_attrs["objectives"], earlier.values or [], strict=True))


def _same_plan(study: optuna.Study, plan: KeepPlan) -> optuna.trial.FrozenTrial | None:
    for trial in _finished(study):
        if trial.user_attrs.get("plan") == plan.digest:
            return trial
    return None


def _incumbent(study: optuna.Study) -> KeepPlan | None:
    """The plan of the lowest complete trial of a single-objective study."""
    done = [t for t in _finished(study) if t.state.name == "COMPLETE"]
    return _plan(min(done, key=lambda t: t.values[0])) if done else None


def _plan(trial: optuna.trial.FrozenTrial) -> KeepPlan:
    kept = json.loads(trial.user_attrs["kept"])
    return KeepPlan(tuple(map(tuple, kept)), int(trial.user_attrs["n_experts"]))


def _winner(study: optuna.Study) -> optuna.trial.FrozenTrial:
    """The lowest trial that holds the gate's limits on the search blocks, else the lowest.

    With several objectives: of the Pareto front, the one with the lowest first objective among
    those that hold the limits.
    """
    done = [t for t in _finished(study) if t.state.name == "COMPLETE"]
    if not done:
        raise UserError("no trial was finished: nothing to export (see the trials' errors above)")
    holding = [t for t in done if max(t.user_attrs["constraints"]) <= 0]
    if len(study.directions) > 1 and holding:
        # fewest experts that still hold: the last objectives decide before the first
        return min(holding, key=lambda t: (list(reversed(t.values)), t.number))
    return min(holding or done, key=lambda t: (t.values, t.number))


def _suggest(trial: optuna.Trial, name: str, space: RangeSettings) -> Any:
    if space.choices is not None:
        return trial.suggest_categorical(name, list(space.choices))
    low, high = space.low, space.high
    assert low is not None, "config.py requires low and high together"
    assert high is not None, "config.py requires low and high together"
    whole = PruningSettings.model_fields[name.removeprefix("pruning.")].annotation is not float
    if whole and all(float(x).is_integer() for x in (low, high, space.step or 1)):
        return trial.suggest_int(
            name, int(low), int(high), step=int(space.step or 1), log=space.log
        )
    return trial.suggest_float(name, low, high, step=space.step, log=space.log)


def _study(problem: Problem, worker: int) -> optuna.Study:
    """The study in its storage, made if it is not there."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    settings = problem.settings
    name = settings.study or f"search-{_identity(problem)[:12]}"
    storage = _storage(settings.storage)
    with FileLock(problem.bench.store.root / "search-storage.lock"):
        study = optuna.create_study(
            study_name=name,
            storage=storage,
            directions=["minimize"] * len(settings.objectives),
            sampler=_sampler(settings, worker),
            load_if_exists=True,
        )
        if "identity" not in study.user_attrs:
            study.set_user_attr("identity", _identity(problem))
            study.set_user_attr("objectives", list(settings.objectives))
    if study.user_attrs["identity"] != _identity(problem):
        raise UserError(
            f"search.study = {name!r} in {settings.storage} was made with other data, space or "
            "settings: choose another search.study, or null"
        )
    return study


def _identity(problem: Problem) -> str:
    """Digest of everything the objective depends on: trials of one study are comparable."""
    bench, settings = problem.bench, problem.settings
    shared = settings.model_dump(
        mode="json", include={"space", "objectives", "seq_len", "num_blocks", "chunk_blocks"}
    )
    return digest(
        {
            **shared,
            "model": problem.base.digest,
            "trace": problem.trace_digest,
            "blocks": [sha for sha, _ in problem.blocks],
            "pruning": bench.experiment.pruning.model_dump(mode="json"),
            "numerics": numerics(bench),
        }
    )


def _storage(url: str) -> Any:
    import optuna
    from optuna.storages.journal import JournalFileBackend

    if url.startswith("journal:"):
        path = resolve_path(url.removeprefix("journal:"))
        path.parent.mkdir(parents=True, exist_ok=True)
        return optuna.storages.JournalStorage(JournalFileBackend(str(path)))
    if url.startswith("sqlite:///"):
        path = resolve_path(url.removeprefix("sqlite:///"))
        path.parent.mkdir(parents=True, exist_ok=True)
        url = f"sqlite:///{path}"
    try:
        return optuna.storages.RDBStorage(
            url, engine_kwargs={"connect_args": {"timeout": 60}} if "sqlite" in url else None
        )
    except Exception as error:  # sqlalchemy and its drivers raise many unrelated types
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"search.storage = {url!r} cannot be used: {first}") from error


def _sampler(settings: SearchSettings, worker: int) -> Any:
    import optuna

    kind = getattr(optuna.samplers, settings.sampler.name, None)
    if not inspect.isclass(kind):
        names = [n for n in optuna.samplers.__all__ if n.endswith("Sampler")]
        raise UserError(
            f"search.sampler.name = {settings.sampler.name!r}; allowed: {', '.join(names)}"
        )
    arguments = dict(settings.sampler.arguments)
    accepted = inspect.signature(kind).parameters
    unknown = sorted(set(arguments) - set(accepted))
    if unknown:
        raise UserError(
            f"search.sampler.arguments names {unknown[0]!r}; {kind.__name__} takes "
            f"{', '.join(accepted)}"
        )
    if "seed" in arguments:
        arguments["seed"] = int(arguments["seed"]) + worker  # workers must not draw alike
    if "constraints_func" in accepted:
        arguments["constraints_func"] = _constraints
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return kind(**arguments)


def _constraints(trial: optuna.trial.FrozenTrial) -> list[float]:
    """Optuna's view of the gate: <= 0 holds; a stopped trial was not measured against it."""
    return list(trial.user_attrs.get("constraints", [1.0]))


def _finished(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    states = (_state("COMPLETE"), _state("PRUNED"))
    found: list[optuna.trial.FrozenTrial] = study.get_trials(deepcopy=False, states=states)
    return found


def _state(name: str) -> Any:
    import optuna

    return optuna.trial.TrialState[name]


def _settings(experiment: Experiment) -> SearchSettings:
    assert experiment.search is not None, "config.py requires search settings for task=search"
    return experiment.search


def _write_trials(bench: Bench, out: Path, study: optuna.Study) -> None:
    """trials.csv and the study's plots, as files of the run and artifacts."""
    rows = [
        {
            "trial": t.number,
            "state": t.state.name,
            **dict(zip(study.user_attrs["objectives"], t.values or [], strict=False)),
            **t.params,
            "plan": t.user_attrs.get("plan", "")[:12],
            "seconds": t.duration.total_seconds() if t.duration else "",
        }
        for t in study.get_trials(deepcopy=False)
    ]
    columns = dict.fromkeys(name for row in rows for name in row)
    text = io.StringIO()
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(rows)
    home = out / "search"
    home.mkdir(exist_ok=True)
    write_atomically(home / "trials.csv", text.getvalue())
    with warnings.catch_warnings():
        # few or equal values make an importance plot dull, not wrong
        warnings.simplefilter("ignore", UserWarning)
        for name, figure in _plots(study):
            figure.write_html(home / f"{name}.html", include_plotlyjs="directory")
    bench.observer.artifact(home)


def _plots(study: optuna.Study) -> Iterator[tuple[str, Any]]:
    import optuna
    from optuna import visualization as draw

    complete = [t for t in _finished(study) if t.state.name == "COMPLETE"]
    for index, objective in enumerate(study.user_attrs["objectives"]):

        def value(trial: optuna.trial.FrozenTrial, index: int = index) -> float:
            return float(trial.values[index])

        named = {"target": value, "target_name": objective}
        yield f"history_{objective}", draw.plot_optimization_history(study, **named)
        yield f"parallel_{objective}", draw.plot_parallel_coordinate(study, **named)
        varied = {v for t in complete for v in [value(t)]}
        if len(varied) > 1 and len(complete) >= 4:
            evaluator = optuna.importance.PedAnovaImportanceEvaluator()
            yield (
                f"importance_{objective}",
                draw.plot_param_importances(study, evaluator=evaluator, **named),
            )
    if len(study.directions) in (2, 3):
        yield "pareto", draw.plot_pareto_front(study, target_names=study.user_attrs["objectives"])
