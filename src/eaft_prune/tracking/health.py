"""The tracking side of task=doctor: server, schema version, runs that are not what they say."""

from __future__ import annotations

import shlex
from collections.abc import Iterable

from eaft_prune.core.diagnosis import Diagnosis
from eaft_prune.core.provenance import describe_process, redact
from eaft_prune.core.types import UserError
from eaft_prune.tracking.history import Archive, is_there, live, local_place, zombies


def check_tracking(uri: str, mend: bool) -> Iterable[Diagnosis]:
    """Reach the server, compare schema versions, check the file, find runs of dead processes."""
    where, place, archive = redact(uri), local_place(uri), Archive(uri)
    if place is not None and not is_there(place):
        yield Diagnosis("tracking", True, f"{place} is not there: the first run makes it")
        return
    try:
        schema = archive.schema()
        if schema is not None and schema[0] not in (schema[1], "none"):
            what = f"{where} has schema {schema[0]}, this MLflow wants {schema[1]}"
            mending = f"mlflow db upgrade {shlex.quote(where)}  # after a backup"
            yield Diagnosis("tracking", False, what, mending)
            return
        if damage := archive.damage():
            what = f"{place} is damaged: {damage}"
            yield Diagnosis("tracking", False, what, _aside(str(place)))
            return
        runs = archive.runs()
    except UserError as error:
        yield Diagnosis("tracking", False, str(error), "" if place is None else _aside(str(place)))
        return
    for run in zombies(runs):
        reason = f"{describe_process(run.tags)} is gone"
        if mend:
            archive.close(run, f"{reason}; noticed by task=doctor")
        settings = ("task=doctor", "doctor.mend=true", f"tracking.uri={where}")
        command = shlex.join(["python", "-m", "eaft_prune", *settings])
        what = f"run {run.run_id} ({run.name}) is RUNNING, but {reason}"
        yield Diagnosis("tracking", False, what, command, mended=mend)
    version = f", schema {schema[1]}" if schema else ""
    what = f"{where} answers{version}; {len(runs)} runs, {len(live(runs))} live"
    yield Diagnosis("tracking", True, what)


def _aside(place: str) -> str:
    return f"mv {shlex.quote(place)} {shlex.quote(place + '.damaged')}"
