"""A multirun: a parent run over its jobs, and one table of how each ended."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eaft_prune.cli import endings, exits
from eaft_prune.cli import job as runner
from eaft_prune.cli.compose import Invocation
from eaft_prune.core.files import write_atomically
from eaft_prune.core.types import UserError
from eaft_prune.report.multirun import GROWTH, counts, frame, markdown, plot, repeats, row, shown
from eaft_prune.report.terminal import listing
from eaft_prune.tracking import (
    RunStatus,
    TrackingError,
    finish_parent,
    signals_raise,
    start_parent,
)

if TYPE_CHECKING:
    from pandas import DataFrame

_WORDS = ("overrides", "status", "verdict", "failed checks", "plan", "settings")
PARENT = "tracking.parent_run_id="  # the override that jobs are given


def run_multirun(invocation: Invocation, launch: Callable[[Sequence[str]], int]) -> int:
    """Run every job under one parent run; returns the worst exit code of the jobs."""
    tracking = invocation.experiments[0].tracking
    before = endings.results(invocation.out)  # of an earlier multirun in the same directory
    endings.clear(invocation.out)
    try:
        parent = start_parent(tracking, f"multirun {len(invocation.points)} jobs", invocation.typed)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return exits.MISUSED
    code = exits.CRASHED
    with signals_raise() as hold:
        try:
            code = launch((*invocation.arguments, f"{PARENT}{parent}"))
        finally:
            hold()  # a later signal waits: what was found is shown, and the parent run closed
            stopped = code in (exits.INTERRUPTED, exits.TERMINATED)
            jobs = _jobs(invocation, endings.found(invocation.out, before), stopped)
            files = _summary(invocation.out, jobs)
            _present(jobs, files)
            failed = (jobs["status"] != endings.FINISHED).any()
            status: RunStatus = "KILLED" if stopped else "FAILED" if failed else "FINISHED"
            try:
                print(f"MLflow      {finish_parent(tracking, parent, status, files, counts(jobs))}")
            except (TrackingError, UserError) as error:  # the jobs are done: their results stand
                print(f"error: {error}", file=sys.stderr)
                code = code or exits.CRASHED
    if stopped:
        return code
    return max([code, *map(int, jobs["exit code"])])


def _present(jobs: DataFrame, files: Sequence[Path]) -> None:
    for title, table in (("", jobs), ("repeats over seeds\n", repeats(jobs))):
        if len(table):
            texts = shown(table)
            right = [head for head in texts if head not in _WORDS]
            print(f"\n{title}{listing(list(texts), texts.to_numpy().tolist(), right=right)}")
    print()
    for number, why in jobs.loc[jobs["error"] != "", ["job", "error"]].to_numpy():
        print(f"job {number:<7} {why}")  # whole, so that paths can be copied
    for file in files:
        print(f"summary     {file}")


def _summary(out: Path, jobs: DataFrame) -> list[Path]:
    """Write the table and the plot; returns the files."""
    out.mkdir(parents=True, exist_ok=True)
    sheet = jobs.to_csv(index=False, lineterminator="\r\n")
    texts = {"summary.md": markdown(jobs), "summary.csv": sheet}
    if (jobs[GROWTH] != "").any():
        texts["summary.html"] = plot(jobs)
    for name, text in texts.items():
        write_atomically(out / name, text)
    return [out / name for name in texts]


def print_plan(invocation: Invocation) -> int:
    """Print for each point whether it is in the store, new, or the same plan as an earlier one."""
    first: dict[str, int] = {}
    missing: dict[str, str] = {}
    rows = []
    errors = []
    changed = _changed(invocation)
    for job, experiment in enumerate(invocation.experiments):
        point = (str(job), " ".join(changed[job]))
        try:
            if (said := runner.foretold(experiment)) is not None:
                print(said)
                continue
            plan, needed = runner.look_ahead(experiment)
        except UserError as error:
            errors.append(f"error: point {job}: {error}")
            rows.append((*point, "error", "", ""))
            continue
        new = {key: what for key, what in needed.items() if key not in missing}
        if not needed:
            state = "cached"
        elif not new:
            state = f"same plan as point {first[plan]}" if plan in first else "nothing new"
        else:
            state = "new"
        first.setdefault(plan, job)
        missing |= new
        rows.append((*point, state, str(len(new)), plan[:12]))
    if rows:
        heads = ("point", "overrides", "state", "evaluations", "plan")
        print(listing(heads, rows))
        print(
            f"\n{len(rows)} points, {len(first)} distinct plans, {len(missing)} evaluations to run"
        )
    for line in errors:
        print(line, file=sys.stderr)
    return exits.MISUSED if errors else exits.OK


def _changed(invocation: Invocation) -> list[list[str]]:
    """Per point the overrides that not all points share."""
    points = invocation.points
    shared = set.intersection(*map(set, points))
    return [[o for o in point if o not in shared] for point in points]


def _jobs(invocation: Invocation, left: endings.Found, stopped: bool) -> DataFrame:
    """A row a job, also of those that left nothing."""
    rows: list[dict[str, Any]] = []
    for job, point in enumerate(_changed(invocation)):
        status, why = left.ending(job, stopped)
        found = {"job": job, "overrides": " ".join(point), "exit code": exits.CRASHED}
        if job in left.results:
            found = row(job, point, left.results[job])
        rows.append({**found, "status": status, "error": why})
    return frame(rows)
