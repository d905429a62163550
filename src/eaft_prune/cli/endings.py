"""How each job of a multirun ended: its result.json, what its queue said, the process it ran in."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from eaft_prune.core import provenance
from eaft_prune.core.files import write_atomically
from eaft_prune.records.result import FILE as RESULT

FINISHED, FAILED, CANCELLED, LOST = "FINISHED", "FAILED", "CANCELLED", "LOST"
STILL_RUNNING = "STILL RUNNING"

BEGAN = "began.json"  # beside result.json: the process that runs a job
QUEUE = "queue.json"  # of a multirun: what its launcher was told of every job

GONE = "GONE"  # no list of the queue knows the job
WITHDRAWN = "WITHDRAWN"  # nor did it ever run: a waiting task that is cancelled leaves no record
_STOPPED = ("CANCELLED", "PREEMPTED", "REVOKED", WITHDRAWN)
_BROKEN = ("BOOT_FAIL", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT")
HAS_ENDED = (*_STOPPED, *_BROKEN, "COMPLETED", GONE)  # every other state may still run
WAITS = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT")


@dataclass(frozen=True)
class Queued:
    """A job as its queue knows it."""

    id: str
    state: str
    log: str

    @property
    def ended(self) -> bool:
        return self.state in HAS_ENDED

    @property
    def waits(self) -> bool:
        """Whether it has yet to run: at first, or again after it was preempted."""
        return self.state in WAITS

    def now(self, state: str) -> Queued:
        return replace(self, state=state)


@dataclass(frozen=True)
class Found:
    """What a multirun left about its jobs, by their numbers."""

    results: Mapping[int, Mapping[str, Any]]
    queued: Mapping[int, Queued]
    began: Mapping[int, Mapping[str, str]]

    def ending(self, job: int, stopped: bool) -> tuple[str, str]:
        """Status and reason, "" for none; stopped: whether the multirun was ended from outside."""
        value = self.results.get(job)
        status = value["status"] if value else None
        why = str(value["error"] or "").partition("\n")[0] if value else ""
        if status == FINISHED:
            return FINISHED, ""
        if job in self.queued:
            return _by_queue(self.queued[job], status, why)
        if status:
            return (FAILED if status == FAILED else CANCELLED), why
        if job in self.began:
            process = self.began[job]
            where = provenance.describe_process(process)
            if not provenance.is_dead(process) and process != provenance.process_tags():
                return STILL_RUNNING, f"in {where}"
            return (CANCELLED if stopped else LOST), f"{where} ended without a result.json"
        if stopped:
            return CANCELLED, "not run: the multirun was stopped"
        return LOST, "the job left no result.json"


def _by_queue(queued: Queued, status: str | None, why: str) -> tuple[str, str]:
    if status == FAILED and not queued.waits:
        return FAILED, why
    if not queued.ended:
        return STILL_RUNNING, f"Slurm job {queued.id} is {queued.state or 'submitted'}"
    log = "" if queued.state == WITHDRAWN else f", log {queued.log}"
    said = f"Slurm job {queued.id}: {queued.state}{log}"
    if queued.state in _BROKEN:
        return FAILED, said
    if queued.state in _STOPPED or status:
        return CANCELLED, said
    return LOST, f"{said}; no result.json"


def results(out: Path) -> dict[Path, int]:
    """Every result.json under a directory and when it was written."""
    return {path: path.stat().st_mtime_ns for path in sorted(out.rglob(RESULT))}


def unfinished(out: Path, before: Mapping[Path, int], queued: Mapping[int, Queued]) -> list[int]:
    """Jobs that are neither gone from their queue nor have come, since `before`, to an end."""
    values = _fresh(out, before)

    def is_done(number: int, job: Queued) -> bool:
        ends = (FINISHED,) if job.waits else (FINISHED, FAILED)
        return job.ended or (number in values and values[number]["status"] in ends)

    return [number for number, job in queued.items() if not is_done(number, job)]


def found(out: Path, before: Mapping[Path, int]) -> Found:
    """What the jobs under a directory have left since `before`."""
    queue = out / QUEUE
    queued = json.loads(queue.read_text()) if queue.exists() else {}
    marks = [json.loads(path.read_text()) for path in sorted(out.rglob(BEGAN))]
    return Found(
        results=_fresh(out, before),
        queued={int(number): Queued(**job) for number, job in queued.items()},
        began={mark["job"]: mark["process"] for mark in marks},
    )


def clear(out: Path) -> None:
    """Forget what an earlier multirun in this directory left of its launcher and processes."""
    for path in (out / QUEUE, *out.rglob(BEGAN)):
        path.unlink(missing_ok=True)


def write_queue(out: Path, queued: Mapping[int, Queued]) -> None:
    """Keep what the launcher knows where the multirun, and whoever looks, finds it."""
    jobs = {str(number): asdict(job) for number, job in queued.items()}
    write_atomically(out / QUEUE, json.dumps(jobs, indent=1) + "\n")


def write_began(out: Path, job: int) -> None:
    """Say which process runs this job of a multirun."""
    mark = {"job": job, "process": provenance.process_tags()}
    write_atomically(out / BEGAN, json.dumps(mark) + "\n")


def _fresh(out: Path, before: Mapping[Path, int]) -> dict[int, Mapping[str, Any]]:
    values = {}
    for path, written in results(out).items():
        if before.get(path) == written:
            continue
        try:
            value = json.loads(path.read_text())
        except ValueError as error:
            print(f"{path} cannot be read: {error}", file=sys.stderr)
            continue
        values[value["job"]] = value
    return values
