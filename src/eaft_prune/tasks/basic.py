"""The arrow, and parts of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from eaft_prune.config import resolve_path
from eaft_prune.core.outcome import Outcome
from eaft_prune.pipeline.arrow import (
    Origin,
    check_plan_fits,
    check_target,
    judge,
    open_base,
)
from eaft_prune.pipeline.criterion import select
from eaft_prune.pipeline.evaluation import Side, measure
from eaft_prune.pipeline.export import write
from eaft_prune.pipeline.session import Session
from eaft_prune.records.evaluation import load_evaluation
from eaft_prune.report.selection import selection_table


def run_profile(session: Session, out: Path) -> Outcome:
    """Trace, scores and plan; no evaluation."""
    base = session.base()
    check_plan_fits(session, base)
    selection = select(session, base)
    text = selection_table(selection)
    return Outcome(selection=selection, base=base.checkpoint, text=text)


def run_prune(session: Session, out: Path) -> Outcome:
    """From packs to the checkpoint on disk; no evaluation."""
    base = session.base()
    check_plan_fits(session, base)
    check_target(session, base)
    selection = select(session, base)
    pruned = write(session, base, selection)
    return Outcome(selection=selection, base=base.checkpoint, checkpoint=pruned.checkpoint)


def run_predownload(session: Session, out: Path) -> Outcome:
    """Fetch model and packs where they come from a hub; check tensors and rows, hash everything."""
    base = session.base()
    files = base.files
    facts = {
        "base": str(files.path),
        "base_digest": base.digest,
        "tensors": len(files.tensors),
        "weight_bytes": files.weight_bytes,
        "packs": {name: str(path) for name, (path, _) in session.pack_files().items()},
    }
    return Outcome(base=base.checkpoint, facts=facts)


def run_evaluate(session: Session, out: Path) -> Outcome:
    """One model against nothing: its own metrics, saved for a later comparison."""
    base = open_base(session)
    evaluation = measure(session, base, Side("base", base))
    return judge(session, out, [evaluation], Origin(base=base.checkpoint))


def run_compare(session: Session, out: Path) -> Outcome:
    """Two saved evaluations: table and gate, no model."""
    paths = session.experiment.compare
    assert paths is not None, "the task requires compare.*"
    base = replace(load_evaluation(resolve_path(paths.base)), model="base")
    candidate = replace(load_evaluation(resolve_path(paths.candidate)), model="pruned")
    return judge(session, out, [base, candidate], Origin())
