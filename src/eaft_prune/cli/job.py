"""One run: settings in; tracked task, report files, result.json and an exit code out."""

from __future__ import annotations

import errno
import logging
import resource
import sys
import time
import traceback
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from eaft_prune import report
from eaft_prune.cli.endings import write_began
from eaft_prune.cli.exits import CRASHED, INTERRUPTED, MISUSED, NOT_PROVEN, OK, TERMINATED
from eaft_prune.config import Experiment, resolve_path
from eaft_prune.core.files import DENIED, write_atomically
from eaft_prune.core.outcome import Outcome
from eaft_prune.core.progress import Bars
from eaft_prune.core.provenance import command
from eaft_prune.core.store import Store
from eaft_prune.core.types import UserError
from eaft_prune.engines.world import RankLost
from eaft_prune.pipeline.fitting import malformed_rows
from eaft_prune.pipeline.observer import Observer, Silent
from eaft_prune.pipeline.preview import preview
from eaft_prune.pipeline.session import Resident, Session
from eaft_prune.records.lock import FILE as LOCK
from eaft_prune.records.lock import lock, versions, write_lock
from eaft_prune.records.result import FILE as RESULT
from eaft_prune.records.result import result, write_result
from eaft_prune.tasks import task_of, validated
from eaft_prune.tasks.task import run_name
from eaft_prune.tracking import MlflowRun, Terminated, TrackingError, track

log = logging.getLogger(__name__)

_RESIDENT = Resident()  # jobs of a multirun in one process share the loaded model


def run(values: dict[str, Any], out: Path, overrides: Sequence[str], job: int | None = None) -> int:
    """Validate, run and record one experiment; returns the exit code, never raises Exception.

    Interrupts are recorded and raised again, so that a multirun stops.
    """
    started = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    (out / LOCK).unlink(missing_ok=True)  # of an earlier run here: this one may not get so far
    if job is not None:
        write_began(out, job)
    facts: dict[str, Any] = {"overrides": list(overrides), "job": job, "mlflow_run_id": None}
    session: Session | None = None

    def finish(status: str, code: int, outcome: Outcome, error: str | None = None) -> int:
        facts.update(
            exit_code=code,
            error=error,
            wall_seconds=round(time.perf_counter() - started, 3),
            memory=peak_memory(),
        )
        records = session.records if session else []
        task = str(values.get("task", {}).get("name"))
        write_result(out, result(task, status, outcome, records, facts))
        return code

    def crashed(error: BaseException) -> int:
        traceback.print_exception(error)
        return finish("FAILED", CRASHED, Outcome(), f"{type(error).__name__}: {error}")

    try:
        experiment = validated(values)
        task = task_of(experiment)
        if not task.tracked:
            outcome = task.run(_session(experiment, Silent(), out), out)
            print(outcome.text)
            return finish("FINISHED", _code(experiment, outcome), outcome)
        name = run_name(task, experiment)
        with track(experiment, out, overrides, versions(), name, task.utility) as tracked:
            facts.update(mlflow_run_id=tracked.run_id, tracking_uri=tracked.uri)
            session = _session(experiment, tracked, out)
            outcome = task.run(session, out)
            tracked.facts(outcome.facts)
            tracked.usage({"memory": peak_memory()})
            if session.records and task.locked:
                packs = session.pack_digests
                locked = lock(experiment, session.records, packs, outcome, overrides)
                tracked.artifact(write_lock(out, locked))
            _present(session, outcome, tracked, job, command(overrides))
            code = finish("FINISHED", _code(experiment, outcome), outcome)
            tracked.artifact(out / RESULT)
            return code
    except KeyboardInterrupt:
        finish("KILLED", INTERRUPTED, Outcome(), "interrupted (SIGINT)")
        raise
    except Terminated as error:
        finish("KILLED", TERMINATED, Outcome(), f"terminated ({error})")
        raise
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return finish("FAILED", MISUSED, Outcome(), str(error))
    except OSError as error:
        what = _of_places(error, session)
        if what is None:
            return crashed(error)
        print(f"error: {what}", file=sys.stderr)
        return finish("FAILED", MISUSED, Outcome(), what)
    except TrackingError as error:  # it names the server and what it said
        print(f"error: {error}", file=sys.stderr)
        return finish("FAILED", CRASHED, Outcome(), str(error))
    except RankLost as error:  # which has been said where it was noticed
        return finish("FAILED", CRASHED, Outcome(), str(error))
    except (Exception, SystemExit) as error:
        # a library's sys.exit must not end the other jobs of a multirun
        return crashed(error)


def _of_places(error: OSError, session: Session | None) -> str | None:
    """What a user is told of a file that cannot be written, or went away with the store."""
    if error.errno in DENIED:
        return f"{error.filename}: {error.strerror}"
    if session is None or error.errno != errno.ENOENT or error.filename is None:
        return None
    root = session.store.root
    if not Path(error.filename).is_relative_to(root):
        return None
    return f"runtime.store_dir = {str(root)!r}: {error.filename} was removed during the run"


def look_ahead(experiment: Experiment) -> tuple[str, dict[str, str]]:
    """Plan digest and missing evaluations of one experiment; records nothing but stage outputs."""
    if task_of(experiment).evaluates != "candidates":
        raise UserError(f"sweep.plan_only looks at task=pipeline, not {experiment.task.name}")
    return preview(_session(experiment, Silent(), Path()))


def foretold(experiment: Experiment) -> str | None:
    """What a task that finds out by itself what to run would run; None of any other."""
    foretell = task_of(experiment).foretell
    return None if foretell is None else foretell(_session(experiment, Silent(), Path()))


def _session(experiment: Experiment, observer: Observer, out: Path) -> Session:
    store = Store(resolve_path(experiment.runtime.store_dir))
    bars = Bars(experiment.runtime.progress)
    return Session(experiment, store, observer, bars, _RESIDENT, out=out)


def peak_memory() -> dict[str, int]:
    """Most bytes this process ever held: resident, and on CUDA devices where it used them."""
    unit = 1 if sys.platform == "darwin" else 1024
    peaks = {"peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    torch = sys.modules.get("torch")  # importing it here would be the peak of a task without it
    if torch is not None and torch.cuda.is_initialized():
        devices = range(torch.cuda.device_count())
        peaks["peak_cuda_bytes"] = sum(torch.cuda.max_memory_allocated(d) for d in devices)
    return peaks


def _code(experiment: Experiment, outcome: Outcome) -> int:
    verdicts = {} if outcome.comparison is None else outcome.comparison.verdicts
    failed = any(verdict.status != "PASS" for verdict in verdicts.values())
    refused = failed and experiment.gate.on_fail == "error"
    return NOT_PROVEN if refused or outcome.differs else OK


def _present(
    session: Session, outcome: Outcome, tracked: MlflowRun, job: int | None, typed: str
) -> None:
    """Print what was found (of a multirun's job the verdict) and where everything is."""
    out = session.out
    if session.records:
        cached = sum(record.cached for record in session.records)
        log.info("\n%d stages, %d of them from the store", len(session.records), cached)
    files = (("result", RESULT), ("lock", LOCK)) if job is None else ()
    where = {name: out / file for name, file in files}
    where = {name: path for name, path in where.items() if name == "result" or path.exists()}
    comparison = outcome.comparison
    if comparison is not None and comparison.candidates:
        where = {"report": _write_reports(session, outcome, tracked, typed), **where}
    if outcome.checkpoint is not None:
        where = {"checkpoint": outcome.checkpoint.path, **where}
    if comparison is not None and job is None:
        print("\n" + report.comparison_table(comparison, session.experiment.gate.measured))
    elif comparison is not None:
        for label, verdict in comparison.verdicts.items():
            print(" ".join([verdict.status, label, *verdict.failed_checks]))
    if outcome.text is not None:
        print("\n" + outcome.text)
    elif outcome.facts:
        print(report.facts_text(outcome.facts))
    for name, path in where.items():
        print(f"{name:<11} {path}")
    print(f"{'MLflow':<11} {tracked.ui_page}")
    if job is None:
        print(f"{'all runs':<11} {tracked.ui_table}")
    if tracked.ui_command and job is None:
        print(f"{'':<11} shown by: {tracked.ui_command}")


def _write_reports(session: Session, outcome: Outcome, tracked: MlflowRun, typed: str) -> Path:
    """Write the HTML report and its Markdown twin; returns the HTML file."""
    experiment, out = session.experiment, session.out
    assert outcome.comparison is not None, "there is nothing to report on"
    facts = _provenance(session, outcome, tracked)
    what, metrics = (outcome.comparison, outcome.selection, facts), experiment.gate.measured
    opening = report.about(experiment, outcome, session.records, typed, datetime.now(UTC))
    quantile = experiment.eval.cc_quantile
    top: Any = {"about": opening, "gains": report.gains(outcome, experiment.speeds)}
    page = report.html_report(*what, **top, cc_quantile=quantile, metrics=metrics)
    twin = report.markdown_report(*what, **top, metrics=metrics)
    for name, text in (("report.html", page), ("report.md", twin)):
        write_atomically(out / name, text)
        tracked.artifact(out / name)
    return out / "report.html"


def _provenance(session: Session, outcome: Outcome, tracked: MlflowRun) -> dict[str, Any]:
    experiment = session.experiment
    facts: dict[str, Any] = {"task": experiment.task.name, "MLflow run": tracked.run_id}
    if outcome.base:
        facts["base"] = {"path": str(outcome.base.path), "digest": outcome.base.digest}
    if outcome.checkpoint:
        checkpoint = outcome.checkpoint
        facts["checkpoint"] = {"path": str(checkpoint.path), "digest": checkpoint.digest}
    if outcome.selection:
        facts["plan digest"] = outcome.selection.plan.digest
        facts["pruning"] = outcome.selection.settings
    for section in ("profile", "eval", "gate"):
        facts[section] = getattr(experiment, section).model_dump(mode="json")
    facts["versions"] = versions()
    uneven = {
        record.stage: said
        for record in session.records
        if record.stage.startswith("pack/") and (said := malformed_rows(record.facts))
    }
    if uneven:
        facts["malformed rows"] = uneven
    facts["stage keys"] = {record.stage: record.key for record in session.records}
    return facts
