"""task=memo: the decision memo from the runs MLflow keeps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from eaft_prune.core.files import write_atomically
from eaft_prune.core.outcome import Outcome
from eaft_prune.core.provenance import redact
from eaft_prune.core.types import UserError
from eaft_prune.pipeline.session import Session
from eaft_prune.report.memo import FILE, decision_memo, recommended
from eaft_prune.tasks.task import Task
from eaft_prune.tracking.history import Archive


def run_memo(session: Session, out: Path, tasks: Mapping[str, Task]) -> Outcome:
    """Write memo.md from the finished runs of one MLflow experiment."""
    settings, tracking = session.experiment.memo, session.experiment.tracking
    assert settings is not None, "config requires memo.* for this task"
    name = settings.experiment or tracking.experiment
    archive = Archive(tracking.uri)
    if settings.experiment and not archive.knows(name):
        raise UserError(f"memo.experiment = {name!r}: MLflow keeps none of this name")
    kept = archive.runs(name, settings.filter)
    finished = [run for run in kept if run.status == "FINISHED" and "task" in run.tags]
    sources = {"MLflow": redact(tracking.uri), "experiment": name}
    if settings.filter:
        sources["filter"] = settings.filter
    pruning, controls = (
        [name for name, task in tasks.items() if task.evaluates == kind]
        for kind in ("candidates", "control")
    )
    write_atomically(out / FILE, decision_memo(finished, sources, pruning, controls))
    session.observer.artifact(out / FILE)
    lines = [f"recommendation, from {len(finished)} finished runs:"]
    lines += [f"  {line}" for line in recommended(finished, pruning)]
    lines.append(f"{'memo':<11} {out / FILE}")
    facts = {"memo": str(out / FILE), "runs": len(finished)}
    return Outcome(facts=facts, text="\n".join(lines))
