"""What Slurm knows of jobs: squeue's word, and sacct's for those that squeue has forgotten."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence

from eaft_prune.cli.endings import GONE, HAS_ENDED, WAITS, WITHDRAWN


def states(before: Mapping[str, str]) -> dict[str, str]:
    """The present state of each job id; before: the last known ones, "" for none yet.

    A state stays as it was while the controller does not answer. A job that no list knows any more
    is GONE, or WITHDRAWN if it had yet to run.
    """
    listed = _asked("squeue", "-h", "-r", "-t", "all", "-u", str(os.getuid()), "-o", "%i|%T")
    if listed is None:
        return dict(before)
    found = {**before, **{job: state for job, state in listed.items() if job in before}}
    lost = [job for job, state in before.items() if job not in listed and state not in HAS_ENDED]
    if lost:
        masters = ",".join(sorted({job.partition("_")[0] for job in lost}))
        kept = _asked("sacct", "-n", "-P", "-X", "-j", masters, "-o", "JobID,State") or {}
        for job in lost:
            found[job] = kept.get(job, WITHDRAWN if before[job] in ("", *WAITS) else GONE)
    return found


def cancel(jobs: Sequence[str]) -> str:
    """Ask for the end of these jobs; what scancel had to object."""
    try:
        done = subprocess.run(["scancel", *jobs], capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        return str(error)
    return done.stderr.strip()


def _asked(*command: str) -> dict[str, str] | None:
    """State by job id, the first word of it; None where the program has no answer."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    if done.returncode:
        return None
    pairs = (line.split("|") for line in done.stdout.splitlines() if "|" in line)
    return {job.strip(): state.split()[0] for job, state, *_ in pairs}
