"""What a task is, and what it asks of the settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from eaft_prune.config import Experiment
from eaft_prune.core.outcome import Outcome
from eaft_prune.pipeline.session import Session

# nothing; one model against nothing; a control of the measurement itself; what eval.candidates
# says; checkpoints of the task's own choice; many plans masked in the base
Evaluates = Literal["nothing", "model", "control", "candidates", "checkpoints", "plans"]


Source = Literal["model", "packs"]


def _no_rule(experiment: Experiment) -> None:
    """Of a task without rules of its own."""


@dataclass(frozen=True)
class Task:
    """One task: everything that the rest of the code asks of it."""

    name: str
    help: str  # one sentence
    run: Callable[[Session, Path], Outcome]  # session, output directory
    settings: tuple[str, ...] = ()  # sections it cannot do without
    needs: str = ""  # how those are given
    reads: tuple[Source, ...] = ("model", "packs")
    writes: bool = False  # a checkpoint, whatever eval.candidates says
    evaluates: Evaluates = "nothing"
    reweighs: bool = False  # cuts many plans from the sums over one trace
    engines: tuple[str, ...] = ()  # the only ones it works with
    utility: bool = False  # proves nothing of a pruning: MLflow keeps its runs apart
    tracked: bool = True  # an MLflow run, with its report and its lock
    locked: bool = True  # its lock says how to repeat it
    check: Callable[[Experiment], None] = _no_rule  # raises UserError: what only this task asks
    foretell: Callable[[Session], str] | None = None  # what sweep.plan_only prints of it

    def exports(self, experiment: Experiment) -> bool:
        """Whether it writes a pruned checkpoint with these settings."""
        asked = self.evaluates == "candidates" and "pruned" in experiment.eval.candidates
        return self.writes or asked


def run_name(task: Task, experiment: Experiment) -> str:
    """Default name: what tells runs apart first, for the UI shows some 20 characters of it."""
    if task.evaluates == "candidates":
        keep = f"keep{experiment.pruning.keep_n}"
        parts = [experiment.model.name, keep, experiment.pruning.name]
    else:
        parts = [task.name, experiment.model.name]
    seeded = task.evaluates in ("model", "control", "candidates", "checkpoints")
    if seeded and experiment.eval.seed is not None:
        parts.append(f"seed{experiment.eval.seed}")
    return " ".join(parts)
