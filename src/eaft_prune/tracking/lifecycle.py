"""Runs begin, and end truthfully: FINISHED, FAILED or KILLED; parents of multiruns included."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Literal

from eaft_prune.config import Experiment, TrackingSettings
from eaft_prune.core import provenance
from eaft_prune.core.text import yaml_text
from eaft_prune.tracking.errors import TrackingError
from eaft_prune.tracking.figures import Batch, Figure
from eaft_prune.tracking.run import MlflowRun

if TYPE_CHECKING:
    from eaft_prune.tracking.server import Server

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]

UTILITIES = "-utilities"  # appended to the experiment's name

_ENDING = (signal.SIGTERM, signal.SIGHUP)
_ERROR_LENGTH = 500
_NOTE_LENGTH = 8000  # of a tag in MLflow

# read by mlflow when it is first imported; what the user has set stays
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "5",  # about a minute: outlives a restart of the server
    "GIT_PYTHON_REFRESH": "quiet",
}


class Terminated(BaseException):
    """SIGTERM or SIGHUP, which it names, came while a run was tracked; like KeyboardInterrupt."""


def set_environment() -> None:
    """What mlflow reads when it is first imported."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def prepare(settings: TrackingSettings, utility: bool = False) -> Server:
    """Create what the tracking URI needs (directory, schema, experiment) and connect.

    utility: whether runs go to the experiment beside, which holds what proves nothing.
    Safe to call from several processes at once. Raises UserError naming `tracking.uri` if the URI
    is malformed or cannot be reached, `tracking.experiment` if the experiment was deleted.
    """
    set_environment()
    from eaft_prune.tracking.server import Server

    return Server(settings.uri, settings.experiment + UTILITIES * utility)


def close_stale_runs(server: Server) -> list[str]:
    """Set RUNNING runs of dead processes of this host to KILLED; returns their ids.

    Runs of other hosts, of other pid namespaces and of live processes are left alone.
    """
    closed = []
    for run_id, tags in server.running(provenance.HOST, socket.gethostname()):
        # its end may have been recorded since it was listed; now that it is dead, none will be
        if provenance.is_dead(tags) and server.is_running(run_id):
            reason = f"{provenance.describe_process(tags)} is gone; noticed by a later start"
            server.log(run_id, Batch(tags={"killed.reason": reason}))
            server.terminate(run_id, "KILLED")
            closed.append(run_id)
    return closed


@contextmanager
def track(
    experiment: Experiment,
    run_dir: Path,
    overrides: Sequence[str],
    versions: Mapping[str, str],
    name: str,
    utility: bool = False,
) -> Iterator[MlflowRun]:
    """A run that ends FINISHED, FAILED on an exception, KILLED on Ctrl-C, SIGTERM or SIGHUP.

    Stale runs are closed first. In the main thread SIGTERM and SIGHUP raise Terminated within the
    block; a SIGHUP that is ignored (nohup) stays ignored.
    Raises UserError if tracking cannot start; TrackingError if it breaks later (when the block has
    failed already, that becomes a note on its exception).
    """
    settings = experiment.tracking
    server = prepare(settings, utility)
    close_stale_runs(server)
    process = provenance.process_tags()
    git = provenance.git_of_code()
    tags = {
        **settings.tags,
        **provenance.source_tags(provenance.command(overrides)),
        **(git.tags if git else {}),
        **{f"version.{package}": version for package, version in versions.items()},
        "task": experiment.task.name,
        "run_dir": str(run_dir.resolve()),
    }
    if settings.parent_run_id:
        tags["mlflow.parentRunId"] = settings.parent_run_id
    with signals_raise() as hold:
        run_id = server.create_run(settings.run_name or name, process)
        run = MlflowRun(server, run_id, experiment)
        try:
            run.tags(tags)
            _log_origin(run, experiment, versions, git)
            with server.sampling(run_id) if settings.system_metrics else nullcontext():
                yield run
            run.stages_file()
            if run.outcome and not settings.run_name:
                server.rename(run_id, f"{run.outcome} {name}")  # lists show some 15 characters
            run.flush()
        except BaseException as error:
            hold()
            try:
                _close_broken(server, run, error)
            except TrackingError as lost:
                error.add_note(f"MLflow run {run_id} could not be closed: {lost}")
            raise
        hold()
        server.terminate(run_id, "FINISHED")


def start_parent(settings: TrackingSettings, name: str, command: str) -> str:
    """Id of a RUNNING run for the runs of a multirun to name as tracking.parent_run_id."""
    server = prepare(settings)
    close_stale_runs(server)
    git = provenance.git_of_code()
    tags = {
        **settings.tags,
        **provenance.process_tags(),
        **provenance.source_tags(command),
        **(git.tags if git else {}),
        "task": "multirun",
    }
    return server.create_run(name, tags)


def finish_parent(
    settings: TrackingSettings,
    run_id: str,
    status: RunStatus,
    artifacts: Sequence[Path] = (),
    metrics: Mapping[str, float] | None = None,
) -> str:
    """End a parent run with its summary, of which markdown becomes its description.

    Returns the run's address in the UI.
    """
    server = prepare(settings)
    now = int(time.time() * 1000)
    server.log(run_id, Batch([Figure(k, v, 0, now) for k, v in (metrics or {}).items()]))
    for path in artifacts:
        server.artifact(run_id, path)
    tables = [path for path in artifacts if path.suffix == ".md"]
    if tables:
        note = tables[0].read_text(encoding="utf-8")
        server.log(run_id, Batch(tags={"mlflow.note.content": note[:_NOTE_LENGTH]}))
    server.terminate(run_id, status)
    return server.ui_page(run_id)


def _log_origin(
    run: MlflowRun,
    experiment: Experiment,
    versions: Mapping[str, str],
    git: provenance.GitState | None,
) -> None:
    values = experiment.model_dump(mode="json")
    run.settings(values)
    run.text(provenance.redact(yaml_text(values)), "config.yaml")
    run.text(json.dumps(dict(versions), indent=1), "versions.json")
    if git and git.status:
        run.text(git.status, "git/status.txt")
        run.text(provenance.redact(git.diff), "git/diff.patch")


def _close_broken(server: Server, run: MlflowRun, error: BaseException) -> None:
    status: RunStatus = "FAILED"
    what = f"{type(error).__name__}: {provenance.one_line(error)}"[:_ERROR_LENGTH]
    tags = {"error": what}
    if isinstance(error, KeyboardInterrupt | Terminated):
        status = "KILLED"
        tags = {"killed.reason": str(error) if isinstance(error, Terminated) else "SIGINT"}
    # the status first: a full disk must not keep it from being true
    server.log(run.run_id, Batch(tags=tags))
    server.terminate(run.run_id, status)
    run.flush()
    run.stages_file()
    run.text(provenance.redact("".join(traceback.format_exception(error))), "traceback.txt")


@contextmanager
def signals_raise() -> Iterator[Callable[[], None]]:
    """Raise Terminated on SIGTERM and SIGHUP until the yielded function is called.

    In the main thread only. A signal that comes later waits for the end of the block: closing a run
    is not cut short.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    held = terminated = False
    late: int | None = None

    def hold() -> None:
        nonlocal held
        held = True

    def on_signal(signum: int, frame: FrameType | None) -> None:
        nonlocal terminated, late
        if held:
            late = signum
            return
        hold()
        terminated = True
        raise Terminated(signal.Signals(signum).name)

    asked = [one for one in _ENDING if signal.getsignal(one) is not signal.SIG_IGN]
    previous = {one: signal.signal(one, on_signal) for one in asked}
    try:
        yield hold
    finally:
        for one, handler in previous.items():
            signal.signal(one, handler or signal.SIG_DFL)
        if late is not None and not terminated:
            signal.raise_signal(late)
