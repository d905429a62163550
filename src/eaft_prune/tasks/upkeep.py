"""task=doctor and task=gc: they look at what runs leave behind, so they are no tracked runs."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path

from eaft_prune.checks import doctor, garbage
from eaft_prune.config import resolve_path
from eaft_prune.core.outcome import Outcome, RunSummary
from eaft_prune.core.store import Store
from eaft_prune.core.types import UserError
from eaft_prune.pipeline.session import Session
from eaft_prune.report.upkeep import diagnoses_table, garbage_table
from eaft_prune.tracking.health import check_tracking
from eaft_prune.tracking.history import Archive, live


def run_doctor(session: Session, out: Path) -> Outcome:
    """Every check; with doctor.mend=true what is safe to mend is mended."""
    experiment, bars = session.experiment, session.bars
    assert experiment.doctor is not None, "config requires doctor.* for this task"
    mend, runtime = experiment.doctor.mend, experiment.runtime
    store, checkpoints = map(resolve_path, (runtime.store_dir, runtime.checkpoint_dir))
    checks = {
        "packages": doctor.check_packages,
        "store": lambda: doctor.check_store(store, bars, mend),
        "checkpoints": lambda: doctor.check_checkpoints(checkpoints, mend),
        "tracking": lambda: check_tracking(experiment.tracking.uri, mend),
        "model": lambda: doctor.check_model(experiment),
        "packs": lambda: doctor.check_packs(experiment),
        "disk": lambda: doctor.check_disk(experiment),
        "device": lambda: doctor.check_device(experiment),
    }
    findings = [one for name, check in checks.items() for one in doctor.safely(name, check)]
    wrong = sum(not (one.ok or one.mended) for one in findings)
    facts = {"wrong": wrong, "findings": [asdict(one) for one in findings]}
    summary = "everything is in order" if not wrong else f"{wrong} findings"
    text = f"{diagnoses_table(findings)}\n{summary}"
    return Outcome(facts=facts, text=text, differs=bool(wrong))


def run_gc(session: Session, out: Path) -> Outcome:
    """Name what nobody needs; with gc.delete=true remove it, unless a run is live."""
    experiment = session.experiment
    settings, runtime = experiment.gc, experiment.runtime
    assert settings is not None, "config requires gc.* for this task"
    archive = Archive(experiment.tracking.uri)
    runs = archive.runs()
    files = garbage.lockfiles(map(resolve_path, settings.lockfiles))
    needs = garbage.needed(runs, archive.aliased(), files)
    now, days = time.time(), settings.older_than_days
    bases = {Path(path) for run in runs if (path := run.tags.get("checkpoint.base.path"))}
    items = [
        *garbage.survey_store(Store(resolve_path(runtime.store_dir)), needs, days, now),
        *garbage.survey_checkpoints(
            resolve_path(runtime.checkpoint_dir), needs, days, now, garbage.base_finder(bases)
        ),
    ]
    going = [item for item in items if item.kept_by is None]
    staying = [(item.kept_by, item.bytes) for item in items if item.kept_by is not None]
    table = garbage_table(
        [(item.what, str(item.path), item.bytes, item.age_days) for item in going], staying
    )
    size = sum(item.bytes for item in going)
    facts = {"runs": len(runs), "lockfiles": len(files), "unneeded": len(going), "bytes": size}
    if not settings.delete:
        hint = "; gc.delete=true removes them" if going else ""
        text = f"{len(going)} items, {size / 1e6:,.2f} MB, nobody needs{hint}"
        return Outcome(facts={**facts, "removed": 0}, text=f"{table}\n{text}")
    _refuse_live(live(archive.runs()))
    removed = [item for item in going if garbage.remove(item)]
    freed = sum(item.bytes for item in removed)
    text = f"removed {len(removed)} of {len(going)} items, {freed / 1e6:,.2f} MB"
    facts |= {"removed": len(removed), "freed": freed}
    return Outcome(facts=facts, text=f"{table}\n{text}")


def _refuse_live(runs: list[RunSummary]) -> None:
    if runs:
        names = ", ".join(f"{run.run_id} ({run.name})" for run in runs)
        raise UserError(
            f"gc.delete=true while runs are live: {names}; wait for them, or end in MLflow those "
            "that died on another host"
        )
