"""What must hold between a task, its engine and the other settings, before anything runs."""

from __future__ import annotations

from eaft_prune.config import Experiment
from eaft_prune.core.plugins import load_object
from eaft_prune.core.types import UserError
from eaft_prune.engines.registry import ENGINES, engine_kind
from eaft_prune.pipeline.harness import check_installed
from eaft_prune.report.gains import bench
from eaft_prune.tasks.task import Task

_TWO_SIDES = ("candidates", "checkpoints", "control")


def check(task: Task, experiment: Experiment) -> None:
    """Raise UserError naming setting, value and remedy where the task cannot be done."""
    for section in task.settings:
        if getattr(experiment, section) is None:
            raise UserError(f"task={task.name} needs {task.needs}")
    _check_layers(task, experiment)
    _check_eval(task, experiment)
    _check_compensation(task, experiment)
    _check_scores(task, experiment)
    _check_engine(task, experiment)
    if experiment.speeds is not None:
        bench(experiment.speeds)
    task.check(experiment)


def _check_layers(task: Task, experiment: Experiment) -> None:
    pruning = experiment.pruning
    ragged = pruning.selection != "uniform" and not experiment.export.pad_ragged
    if ragged and task.exports(experiment) and task.evaluates != "control":
        raise UserError(
            f"pruning.selection = {pruning.selection!r} lets layers keep unequal numbers of "
            "experts, which a checkpoint cannot hold: use eval.candidates=[masked], or "
            "export.pad_ragged=true"
        )


def _check_eval(task: Task, experiment: Experiment) -> None:
    asked = experiment.eval
    if asked.top_k is not None and task.evaluates not in ("nothing", "candidates"):
        raise UserError(
            f"eval.top_k = {asked.top_k} has no effect with task={task.name}: use task=pipeline"
        )
    if asked.generation and task.evaluates not in _TWO_SIDES:
        raise UserError(
            "eval.generation = true needs a base and a candidate: task=pipeline, frontier, "
            f"candidate, noise_floor or noop, not {task.name}"
        )
    if asked.generation and experiment.packs.format == "plain":
        raise UserError("eval.generation = true needs packs of conversations: packs.format=harmony")
    if asked.tasks:
        if task.evaluates not in ("candidates", "control"):
            raise UserError(
                f"eval.tasks = {list(asked.tasks)} needs a base and a candidate: task=pipeline, "
                f"noise_floor or noop, not {task.name}"
            )
        check_installed()
    if asked.early_stop and task.evaluates not in _TWO_SIDES:
        raise UserError(
            "eval.early_stop = true needs a base, a candidate and their gate: "
            f"task=pipeline, frontier, candidate, noise_floor or noop, not {task.name}"
        )


def _check_compensation(task: Task, experiment: Experiment) -> None:
    level = experiment.pruning.compensation
    if level == "none":
        return
    asked = f"pruning.compensation = {level!r}"
    if task.evaluates == "plans":
        raise UserError(
            f"{asked} changes weights, and task={task.name} scores plans masked in the base model, "
            "whose weights are as they were: use task=pipeline"
        )
    if task.evaluates == "control":
        raise UserError(
            f"{asked} has no effect with task={task.name}, which drops nothing: drop it"
        )
    if task.evaluates == "candidates" and "masked" in experiment.eval.candidates:
        raise UserError(
            f"{asked} changes weights, and a masked candidate has the base's: use "
            "eval.candidates=[pruned]"
        )


def _check_scores(task: Task, experiment: Experiment) -> None:
    pruning = experiment.pruning
    if task.reweighs and (pruning.measured or pruning.selection == "marginal_loss"):
        key = "saliency" if pruning.measured else "selection"
        raise UserError(
            f"pruning.{key} = {getattr(pruning, key)!r} measures the model, task={task.name} only "
            "its trace: use task=pipeline"
        )
    if pruning.function is None:
        return
    load_object("pruning.function", pruning.function)
    if task.reweighs:
        raise UserError(
            f"pruning.function = {pruning.function!r} scores a whole trace, task={task.name} "
            "weighs its sums: use task=pipeline"
        )


def _check_engine(task: Task, experiment: Experiment) -> None:
    """What the engine that evaluates cannot do."""
    kind, asked = engine_kind(experiment.engine.name), experiment.eval
    if task.engines and kind.name not in task.engines:
        allowed = " or ".join(f"engine={name}" for name in task.engines)
        raise UserError(f"task={task.name} asks another program than this one: give {allowed}")
    masks = task.evaluates == "plans" or "masked" in asked.candidates
    if masks and not kind.profiles:
        raise UserError(
            f"engine={kind.name} cannot mask experts (task=search, task=ablate, "
            "eval.candidates=[masked]): use engine=transformers for that"
        )
    what = "eval.generation = true" if asked.generation else f"eval.tasks = {list(asked.tasks)}"
    writes = kind.writes and (kind.compares or not asked.tasks)
    if (asked.generation or asked.tasks) and not writes:
        can = " or ".join(f"engine={name}" for name, one in ENGINES.items() if one.writes)
        raise UserError(f"{what} needs {can}, not engine.name={kind.name}: drop it")
    if experiment.export.smoke and not (
        task.evaluates == "candidates" and task.exports(experiment)
    ):
        raise UserError(
            "export.smoke has no effect where no checkpoint is exported and evaluated: use "
            "task=pipeline and eval.candidates=[pruned], or drop it"
        )
    two = task.evaluates in ("candidates", "checkpoints") or (
        task.writes and task.evaluates == "control"
    )
    if two and experiment.engine.base_url is not None:
        raise UserError(
            f"task={task.name} evaluates two checkpoints, engine.base_url serves one: launch "
            "servers with engine.python, or use task=evaluate twice and task=compare"
        )
