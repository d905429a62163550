"""Optuna over pruning settings: the only module that imports optuna.

A study is resumable: n_trials counts finished trials, whoever ran them. Plans are evaluated masked,
chunk by chunk, and a plan that any trial has evaluated is never evaluated again. What a trial draws
depends on the seed and on the finished trials alone, so a search that was killed and started again
ends as one that was not.
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
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock
from pydantic import ValidationError

from eaft_prune.bench import Bench, Model, Resident
from eaft_prune.config import (
    Experiment,
    PruningSettings,
    RangeSettings,
    SamplerSettings,
    SearchSettings,
    resolve_path,
)
from eaft_prune.fingerprint import digest
from eaft_prune.pipeline import judge, measure, requests, write
from eaft_prune.profiling import numerics
from eaft_prune.progress import Bars
from eaft_prune.result import write_atomically
from eaft_prune.stages import evaluate, export
from eaft_prune.stages import plan as planning
from eaft_prune.stages import score as scoring
from eaft_prune.store import Store
from eaft_prune.tracking import MlflowRun, prepare
from eaft_prune.tracking.provenance import is_dead, process_tags, redact
from eaft_prune.trials import (
    Problem,
    behind,
    measured,
    open_problem,
    plan_of,
    running_dnll,
    settings_of,
)
from eaft_prune.types import KeepPlan, Outcome, Selection, UserError

if TYPE_CHECKING:
    import optuna

log = logging.getLogger(__name__)

_FAILURES_IN_A_ROW = 5  # then the search ends: it is not the trials' settings
_WAIT_SECONDS = 0.5
_SILENT = timedelta(hours=1)  # a running trial of another host that is older is not waited for


def run_search(bench: Bench, out: Path) -> Outcome:
    """Search, then export the winner and gate it on evaluation rows the search never saw."""
    settings = _settings(bench.experiment)
    base = bench.base()
    distributions = _distributions(bench.experiment)
    _check_space(bench.experiment, distributions, base)
    _sampler(settings, 0)
    _pruner(settings)
    for request in requests(bench):  # what the winner is gated on: rows may be too few
        bench.blocks(base, request)
    if bench.experiment.export.path:
        export.check_target(resolve_path(bench.experiment.export.path))
    problem = open_problem(bench, settings)
    study = _study(problem)
    before = len(_finished(study))
    started = time.perf_counter()
    _run_workers(problem, study)
    spent = time.perf_counter() - started
    _write_trials(bench, out, study)
    best = _winner(study)
    if best is None:
        raise UserError("no trial was finished: nothing to export (see the trials' errors above)")
    plan, pruning = _plan(best), settings_of(bench.experiment.pruning, best.params)
    finished = _finished(study)
    facts = {
        "study": study.study_name,
        "trials": len(finished),
        "trials_now": len(finished) - before,
        "trials_stopped": sum(t.state.name == "PRUNED" for t in finished),
        "trials_failed": len(_failed(study)),
        "distinct_plans": len({t.user_attrs["plan"] for t in finished}),
        "search_seconds": round(spent, 2),
        "best_trial": best.number,
        "best_settings": dict(best.params),
        "best_values": dict(zip(settings.objectives, best.values, strict=True)),
    }
    for trial in _failed(study):
        log.warning("trial %d failed: %s", trial.number, trial.user_attrs["error"])
    selection = Selection(pruning.name, scoring.score(pruning, problem.trace), plan)
    bench.observer.plan(plan)
    # what is written says how it was chosen
    bench = replace(bench, experiment=bench.experiment.model_copy(update={"pruning": pruning}))
    pruned = write(bench, base, selection)
    first = measure(bench, base, "base", base)
    second = measure(bench, pruned, "pruned", base)
    return judge(bench, out, first, [second], selection, base.checkpoint, pruned.checkpoint, facts)


def _run_workers(problem: Problem, study: optuna.Study) -> None:
    settings, bench = problem.settings, problem.bench
    others = [
        multiprocessing.get_context("spawn").Process(
            target=_worker,
            args=(bench.experiment.model_dump(), bench.observer.run_id),
            daemon=True,
        )
        for _ in range(1, settings.workers)
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


def _worker(values: dict[str, Any], run_id: str) -> None:
    """A further process on the same study, store and MLflow run."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    experiment = Experiment.model_validate(values)
    tracked = MlflowRun(prepare(experiment.tracking), run_id, experiment)
    store = Store(resolve_path(experiment.runtime.store_dir))
    bench = Bench(experiment, store, tracked, Bars(False), Resident())
    problem = open_problem(bench, _settings(experiment))
    _work(problem, _study(problem))


def _work(problem: Problem, study: optuna.Study) -> None:
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
        values: dict[str, float] = {}
        try:
            how, values = _run_trial(problem, study, trial)
            failures = 0
        except (Exception, SystemExit) as error:
            failures += 1
            how = f"failed: {type(error).__name__}: {error}".splitlines()[0]
            trial.set_user_attr("error", how.removeprefix("failed: "))
            _tell(problem, study, trial, state=_state("FAIL"))
            if failures == _FAILURES_IN_A_ROW:
                raise
        except BaseException:
            _tell(problem, study, trial, state=_state("FAIL"))
            raise
        seconds = time.perf_counter() - started
        shown = "  ".join(f"{name} {value:.5g}" for name, value in values.items())
        log.info("trial %-4d %-36s %6.2f s  %s", trial.number, how, seconds, shown)
        problem.bench.observer.point(
            f"trial {trial.number}",
            trial.params,
            {**values, "seconds": seconds},
            {"plan.digest": trial.user_attrs.get("plan", ""), "trial.outcome": how},
        )


def _ask(problem: Problem, study: optuna.Study) -> tuple[optuna.Trial | None, int]:
    """The next trial, or None when n_trials are finished or running; and how many are running."""
    settings = problem.settings
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        return None, 0  # the search was killed: a worker does not go on by itself
    # asked under a lock, so that workers on one store do not start more trials than are wanted
    with FileLock(problem.bench.store.root / f"search-{digest(study.study_name)[:16]}.lock"):
        running = 0
        for other in study.get_trials(deepcopy=False):
            if other.state.is_finished():
                continue
            # the lock is held: a trial without its process's name was asked by one that died since
            process = other.user_attrs.get("process")
            if process is None or is_dead(process):
                study.tell(other.number, state=_state("FAIL"), skip_if_finished=True)
            elif other.datetime_start and datetime.now() - other.datetime_start < _SILENT:
                running += 1
        known = len(_finished(study)) + running
        exhausted = study.user_attrs.get("exhausted") == settings.sampler.model_dump_json()
        if known >= settings.n_trials or exhausted:
            return None, running
        study.sampler = _sampler(settings, known + len(_failed(study)))
        trial = study.ask(_distributions(problem.bench.experiment))
        trial.set_user_attr("process", process_tags())
        return trial, running


def _tell(
    problem: Problem,
    study: optuna.Study,
    trial: optuna.Trial,
    values: list[float] | None = None,
    state: Any = None,
) -> None:
    try:
        # Ctrl-C may come between a trial's end and here
        study.tell(trial, values, state=state, skip_if_finished=True)
    except RuntimeError as error:
        # a sampler that has asked for all there is (a grid) stops the study, once told
        if "Study.stop" not in str(error):
            raise
        study.set_user_attr("exhausted", problem.settings.sampler.model_dump_json())


def _run_trial(
    problem: Problem, study: optuna.Study, trial: optuna.Trial
) -> tuple[str, dict[str, float]]:
    """Evaluate one point and tell the study; returns how it ended and what was seen."""
    settings, experiment = problem.settings, problem.bench.experiment
    plan = plan_of(problem, settings_of(experiment.pruning, trial.params))
    earlier = _same_plan(study, plan, settings)
    trial.set_user_attr("plan", plan.digest)
    if earlier is not None:
        return f"same plan as trial {earlier.number}", _repeat(problem, study, trial, earlier)
    # not of a repeat: of equal trials the first is the winner
    trial.set_user_attr("kept", json.dumps(plan.kept))
    trial.set_user_attr("n_experts", plan.n_experts)
    if settings.objectives == ("dnll",):
        best = _incumbent(study) if settings.stop_confidence is not None else None
        for done, value in enumerate(running_dnll(problem, plan), start=1):
            trial.report(value, done)
            if done == len(problem.chunks):
                break
            if trial.should_prune() or (
                best is not None
                and settings.stop_confidence is not None
                and behind(problem, plan, best, done, settings.stop_confidence)
            ):
                partial = measured(problem, plan, experiment.gate, done)
                _constrain(trial, partial.constraints)
                _tell(problem, study, trial, state=_state("PRUNED"))
                return f"stopped after {done} of {len(problem.chunks)} chunks", {"dnll": value}
    found = measured(problem, plan, experiment.gate)
    _constrain(trial, found.constraints)
    trial.set_user_attr("hopeless", found.hopeless)
    _tell(problem, study, trial, [found.values[name] for name in settings.objectives])
    return "evaluated", {**found.values, "violation": max(found.constraints.values())}


def _repeat(
    problem: Problem,
    study: optuna.Study,
    trial: optuna.Trial,
    earlier: optuna.trial.FrozenTrial,
) -> dict[str, float]:
    """Tell a trial what an earlier one with the same plan found."""
    for step, value in earlier.intermediate_values.items():
        trial.report(value, step)
    _constrain(trial, earlier.constraints)
    trial.set_user_attr("hopeless", earlier.user_attrs.get("hopeless", False))
    if earlier.state.name == "PRUNED":
        _tell(problem, study, trial, state=earlier.state)
        return {"dnll": earlier.intermediate_values[max(earlier.intermediate_values)]}
    _tell(problem, study, trial, earlier.values)
    return dict(zip(problem.settings.objectives, earlier.values or [], strict=True))


def _same_plan(
    study: optuna.Study, plan: KeepPlan, settings: SearchSettings
) -> optuna.trial.FrozenTrial | None:
    stopping = settings.stop_confidence is not None or settings.pruner is not None
    for trial in _finished(study):
        if trial.user_attrs.get("plan") == plan.digest and (
            stopping or trial.state.name == "COMPLETE"
        ):
            return trial
    return None


def _incumbent(study: optuna.Study) -> KeepPlan | None:
    """The plan whose losses nobody above can win with; None while there is no such plan.

    Whoever loses more than the best so far cannot win if that holds the gate's limits, nor if its
    perplexity alone breaks them. In between a worse loss could still hold them: nobody is stopped.
    """
    best = _winner(study)
    if best is None or not (_holds(best) or best.user_attrs["hopeless"]):
        return None
    return _plan(best)


def _plan(trial: optuna.trial.FrozenTrial) -> KeepPlan:
    kept = json.loads(trial.user_attrs["kept"])
    return KeepPlan(tuple(map(tuple, kept)), int(trial.user_attrs["n_experts"]))


def _winner(study: optuna.Study) -> optuna.trial.FrozenTrial | None:
    """The trial with the lowest objectives, compared in their order, of those that hold the gate's
    limits on the search blocks; with objectives keep_n, dnll: the fewest experts that hold.

    If none holds them: the lowest objective, or with several the least sum of violations. None if
    no trial is complete.
    """
    done = [t for t in _finished(study) if t.state.name == "COMPLETE"]
    holding = [t for t in done if _holds(t)]
    if not holding and len(study.directions) > 1:
        return min(done, key=lambda t: (_violation(t), t.values, t.number), default=None)
    return min(holding or done, key=lambda t: (t.values, t.number), default=None)


def _holds(trial: optuna.trial.FrozenTrial) -> bool:
    return bool(max(trial.constraints.values()) <= 0)


def _violation(trial: optuna.trial.FrozenTrial) -> float:
    return float(sum(max(value, 0.0) for value in trial.constraints.values()))


def _distributions(experiment: Experiment) -> dict[str, Any]:
    """Optuna's distribution of every searched setting; raises UserError where it cannot be one."""
    made = {}
    for name, space in _settings(experiment).space.items():
        field = name.removeprefix("pruning.")
        whole = PruningSettings.model_fields[field].annotation is not float
        step = space.step
        if field == "keep_n" and step is None:
            step = experiment.pruning.keep_multiple
        try:
            made[name] = _distribution(space, whole, step)
        except ValueError as error:
            raise UserError(f"search.space.{name}: {error}") from error
    return made


def _distribution(space: RangeSettings, whole: bool, step: float | None) -> Any:
    from optuna import distributions

    def number(value: Any) -> Any:
        plain = isinstance(value, float) and value.is_integer()
        return int(value) if whole and plain else value

    if space.choices is not None:
        return distributions.CategoricalDistribution([number(value) for value in space.choices])
    assert space.low is not None, "config requires low and high together"
    assert space.high is not None, "config requires low and high together"
    if not whole:
        return distributions.FloatDistribution(space.low, space.high, log=space.log, step=step)
    low, high, by = number(space.low), number(space.high), number(step or 1)
    if not all(isinstance(value, int) for value in (low, high, by)):
        raise ValueError(f"takes whole numbers, got {space.low}, {space.high}, step {by}")
    return distributions.IntDistribution(low, high, log=space.log, step=by)


def _check_space(experiment: Experiment, distributions: dict[str, Any], base: Model) -> None:
    """Raise UserError unless each setting may take the ends of its range, or every choice."""
    config = base.files.config
    for name, distribution in distributions.items():
        ends = getattr(distribution, "choices", None)
        for value in ends or (distribution.low, distribution.high):
            try:
                pruning = settings_of(experiment.pruning, {name: value})
            except ValidationError as error:
                why = error.errors()[0]["msg"]
                raise UserError(f"search.space.{name}: {value!r}: {why}") from None
            planning.check_keep_n(pruning, base.family.n_experts(config), base.family.top_k(config))
            if pruning.keep_n % pruning.keep_multiple:
                raise UserError(
                    f"search.space.{name}: pruning.keep_n = {pruning.keep_n} is not a multiple of "
                    f"pruning.keep_multiple = {pruning.keep_multiple}"
                )


def _study(problem: Problem) -> optuna.Study:
    """The study in its storage, made if it is not there."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    settings = problem.settings
    name = settings.study or f"search-{_identity(problem)[:12]}"
    # databases break when two processes make their tables at once
    with FileLock(problem.bench.store.root / "search-storage.lock"):
        study = optuna.create_study(
            study_name=name,
            storage=_storage(settings.storage),
            directions=["minimize"] * len(settings.objectives),
            sampler=_sampler(settings, 0),
            pruner=_pruner(settings),
            load_if_exists=True,
        )
        if "identity" not in study.user_attrs:
            study.set_user_attr("identity", _identity(problem))
            study.set_user_attr("objectives", list(settings.objectives))
    if study.user_attrs["identity"] != _identity(problem):
        raise UserError(
            f"search.study = {name!r} in {redact(settings.storage)} was made with other data, "
            "space or settings: choose another search.study, or null"
        )
    return study


def _identity(problem: Problem) -> str:
    """Digest of everything a trial's values depend on: trials of one study are comparable."""
    bench, settings = problem.bench, problem.settings
    experiment = bench.experiment
    searched = {name.removeprefix("pruning.") for name in settings.space}
    return digest(
        {
            **settings.model_dump(
                mode="json",
                include={"space", "objectives", "seq_len", "num_blocks", "chunk_blocks"},
            ),
            "versions": [scoring.VERSION, planning.VERSION, evaluate.VERSION],
            "model": problem.base.digest,
            "trace": problem.trace_digest,
            "blocks": [sha for sha, _ in problem.blocks],
            "pruning": experiment.pruning.model_dump(mode="json", exclude={"name", *searched}),
            "limits": {
                name: value
                for name, value in experiment.gate.model_dump(mode="json").items()
                if name.startswith("max_")
            },
            "cc_quantile": experiment.eval.cc_quantile,
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
        first = redact((str(error).strip() or type(error).__name__).splitlines()[0])
        raise UserError(f"search.storage = {redact(url)!r} cannot be used: {first}") from error


def _sampler(settings: SearchSettings, draw: int) -> Any:
    """The sampler for the draw-th point: seeded by it, so that a resumed search draws on."""
    import optuna

    chosen = settings.sampler
    if "seed" in chosen.arguments:
        seed = int(chosen.arguments["seed"]) + draw
        chosen = chosen.model_copy(update={"arguments": {**chosen.arguments, "seed": seed}})
    return _made("search.sampler", optuna.samplers, "Sampler", chosen)


def _pruner(settings: SearchSettings) -> Any:
    import optuna

    chosen = settings.pruner or SamplerSettings(name="NopPruner")
    return _made("search.pruner", optuna.pruners, "Pruner", chosen)


def _made(setting: str, module: Any, suffix: str, chosen: SamplerSettings) -> Any:
    """An object of one of Optuna's classes by name; raises UserError naming the setting."""
    import optuna

    kind = getattr(module, chosen.name, None)
    names = [n for n in module.__all__ if n.endswith(suffix) and n != f"Base{suffix}"]
    if not inspect.isclass(kind) or chosen.name not in names:
        raise UserError(f"{setting}.name = {chosen.name!r}; allowed: {', '.join(names)}")
    accepted = inspect.signature(kind).parameters
    unknown = sorted(set(chosen.arguments) - set(accepted))
    if unknown:
        raise UserError(
            f"{setting}.arguments names {unknown[0]!r}; {kind.__name__} takes {', '.join(accepted)}"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        try:
            return kind(**chosen.arguments)
        except (TypeError, ValueError, ImportError) as error:
            raise UserError(f"{setting} = {chosen.name}: {error}") from error


def _constrain(trial: optuna.Trial, constraints: Mapping[str, float]) -> None:
    """Tell Optuna of the gate: <= 0 holds; of a stopped trial on the blocks it has seen."""
    for name, value in constraints.items():
        trial.set_constraint(name, value)


def _finished(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    states = (_state("COMPLETE"), _state("PRUNED"))
    found: list[optuna.trial.FrozenTrial] = study.get_trials(deepcopy=False, states=states)
    return found


def _failed(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    """Trials that raised; those of killed processes are not among them."""
    failed = study.get_trials(deepcopy=False, states=(_state("FAIL"),))
    return [trial for trial in failed if "error" in trial.user_attrs]


def _state(name: str) -> Any:
    import optuna

    return optuna.trial.TrialState[name]


def _settings(experiment: Experiment) -> SearchSettings:
    assert experiment.search is not None, "config requires search settings for task=search"
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
            "error": t.user_attrs.get("error", ""),
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
