"""task=doctor and task=gc: they look at what runs leave behind, so they are no tracked runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from eaft_prune.checks import doctor, garbage
from eaft_prune.checks.engines import check_engines
from eaft_prune.checks.needs import lockfiles, needed
from eaft_prune.checks.whereabouts import Whereabouts
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
        "engines": lambda: check_engines(experiment),
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
    archive, days = Archive(experiment.tracking.uri), settings.older_than_days
    places = [resolve_path(place) for place in settings.lockfiles]
    runs = archive.runs()
    files = lockfiles(places)
    needs = needed(runs, archive.aliased(), files)
    store, checkpoints = map(resolve_path, (runtime.store_dir, runtime.checkpoint_dir))
    now = time.time()
    items = [
        *garbage.survey_store(Store(store), now),
        *garbage.survey_checkpoints(checkpoints, _whereabouts(runs), now),
    ]
    reasons = [garbage.keeps(item, needs, days) for item in items]
    going = [item for item, why in zip(items, reasons, strict=True) if why is None]
    staying = [(why, item.bytes) for item, why in zip(items, reasons, strict=True) if why]
    rows = [(i.what, i.name, i.bytes, i.age_days, needs.lost(i.names)) for i in going]
    table = garbage_table(rows, staying)
    size = sum(item.bytes for item in going)
    facts = {
        "runs": len(runs),
        "lockfiles": len(files),
        "unneeded": len(going),
        "bytes": size,
        "paths": [str(item.path) for item in going],
    }
    where = f"in {store} and {checkpoints}"
    if not settings.delete:
        hint = "; gc.delete=true removes them" if going else ""
        text = f"{len(going)} items {where}, {size / 1e6:,.2f} MB, nobody needs{hint}"
        return Outcome(facts={**facts, "removed": 0}, text=f"{table}\n{text}")
    if runs_now := live(archive.runs()):
        raise UserError(f"gc.delete=true while {_busy(runs_now)}")

    def why_now() -> Callable[[garbage.Item], str | None]:
        """Another run may have begun, and even ended, since the survey."""
        runs = archive.runs()
        if busy := live(runs):
            return lambda item: _busy(busy)
        again = needed(runs, archive.aliased(), lockfiles(places))
        return lambda item: garbage.keeps(item, again, days)

    stayed = list(zip(going, garbage.remove(going, why_now), strict=True))
    removed = [item for item, why in stayed if why is None]
    freed = sum(item.bytes for item in removed)
    lines = [f"kept {item.what} {item.name}: {why}" for item, why in stayed if why is not None]
    text = f"removed {len(removed)} of {len(going)} items {where}, {freed / 1e6:,.2f} MB"
    facts |= {"removed": len(removed), "freed": freed}
    return Outcome(facts=facts, text="\n".join([table, *lines, text]))


def _whereabouts(runs: Sequence[RunSummary]) -> Whereabouts:
    """Where the tracker's runs read their inputs."""
    bases = {Path(path) for run in runs if (path := run.tags.get("checkpoint.base.path"))}
    packs = {Path(path) for run in runs for path in run.packs.values()}
    scores = {resolve_path(path) for run in runs if (path := run.params.get("scores"))}
    return Whereabouts(frozenset(bases), frozenset(packs | scores))


def _busy(runs: Sequence[RunSummary]) -> str:
    names = ", ".join(f"{run.run_id} ({run.name})" for run in runs)
    return (
        f"runs are live: {names}; wait for them, or end in MLflow those that died on another host"
    )
