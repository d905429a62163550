"""A multirun: a parent run over its jobs, and one table of how each ended."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eaft_prune import runner
from eaft_prune.config import Experiment
from eaft_prune.result import FILE, write_atomically
from eaft_prune.tracking import finish_parent, start_parent

_COLUMNS = ("job", "overrides", "status", "gate", "failed checks", "dPPL", "plan", "error")


@dataclass(frozen=True)
class Invocation:
    """A checked command line: every point composes and validates."""

    arguments: tuple[str, ...]  # for Hydra
    points: tuple[tuple[str, ...], ...]  # overrides of each job
    multirun: bool
    out: Path
    experiments: tuple[Experiment, ...]


def run_multirun(invocation: Invocation, launch: Callable[[Sequence[str]], int]) -> int:
    """Run every job under one parent run; returns the worst exit code of the jobs."""
    tracking = invocation.experiments[0].tracking
    parent = start_parent(tracking, f"multirun {len(invocation.points)} jobs", invocation.arguments)
    code = runner.CRASHED
    try:
        code = launch((*invocation.arguments, f"tracking.parent_run_id={parent}"))
    finally:
        rows = _rows(invocation)
        write_atomically(invocation.out / "summary.csv", _csv(rows))
        write_atomically(invocation.out / "summary.md", _markdown(rows))
        stopped = code in (runner.INTERRUPTED, runner.TERMINATED)
        failed = any(row["status"] != "FINISHED" for row in rows)
        finish_parent(
            tracking,
            parent,
            "KILLED" if stopped else "FAILED" if failed else "FINISHED",
            [invocation.out / "summary.md", invocation.out / "summary.csv"],
            {
                "jobs": len(rows),
                "jobs/failed": sum(row["status"] != "FINISHED" for row in rows),
                "jobs/gate_pass": sum(row["gate"] == "PASS" for row in rows),
                "plans/distinct": len({row["plan"] for row in rows if row["plan"]}),
            },
        )
        print(f"\n{_markdown(rows)}\nsummary     {invocation.out / 'summary.csv'}")
    if stopped:
        return code
    codes = [int(row["exit code"]) for row in rows]
    return max([code, *codes])


def print_plan(invocation: Invocation) -> int:
    """Print for each point whether it is in the store, new, or the same plan as an earlier one."""
    first: dict[str, int] = {}
    missing: dict[str, str] = {}
    rows = []
    changed = _changed(invocation)
    for job, experiment in enumerate(invocation.experiments):
        plan, needed = runner.look_ahead(experiment)
        new = {key: what for key, what in needed.items() if key not in missing}
        if not needed:
            state = "cached"
        elif not new:
            state = f"same plan as point {first[plan]}" if plan in first else "nothing new"
        else:
            state = "new"
        first.setdefault(plan, job)
        missing |= new
        rows.append((str(job), " ".join(changed[job]), state, str(len(new)), plan[:12]))
    heads = ("point", "overrides", "state", "evaluations", "plan")
    widths = [max(len(row[i]) for row in (heads, *rows)) for i in range(len(heads))]
    for row in (heads, *rows):
        print("  ".join(c.ljust(width) for c, width in zip(row, widths, strict=True)).rstrip())
    print(f"\n{len(rows)} points, {len(first)} distinct plans, {len(missing)} evaluations to run")
    return runner.OK


def _changed(invocation: Invocation) -> list[list[str]]:
    """Per point the overrides that not all points share."""
    points = invocation.points
    shared = set.intersection(*map(set, points)) if len(points) > 1 else set()
    return [[o for o in point if o not in shared] for point in points]


def _rows(invocation: Invocation) -> list[dict[str, Any]]:
    found = {}
    for path in sorted(invocation.out.rglob(FILE)):
        try:
            value = json.loads(path.read_text())
        except ValueError as error:
            print(f"{path} cannot be read: {error}", file=sys.stderr)
            continue
        found[value["job"]] = value
    return [_row(job, point, found.get(job)) for job, point in enumerate(_changed(invocation))]


def _row(job: int, point: Sequence[str], value: dict[str, Any] | None) -> dict[str, Any]:
    row = dict.fromkeys(_COLUMNS, "") | {"job": job, "overrides": " ".join(point)}
    if value is None:
        return row | {
            "status": "NO RESULT",
            "error": "the job left no result.json",
            "exit code": runner.CRASHED,
        }
    gate, plan = value["gate"], value["plan"]
    row |= {
        "status": value["status"],
        "error": (value["error"] or "").splitlines()[0] if value["error"] else "",
        "exit code": value["exit_code"],
        "plan": plan["digest"][:12] if plan else "",
    }
    if gate:
        row |= {
            "gate": gate["status"],
            "failed checks": " ".join(gate["failed_checks"]),
            "dPPL": " ".join(
                f"{check['value']:+.4f}" for check in gate["checks"] if check["name"] == "dppl"
            ),
        }
    return row


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, [*_COLUMNS, "exit code"])
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _markdown(rows: Sequence[dict[str, Any]]) -> str:
    used = [c for c in _COLUMNS if any(str(row[c]) for row in rows)]
    lines = ["| " + " | ".join(used) + " |", "|" + " --- |" * len(used)]
    for row in rows:
        cells = (str(row[c]).replace("|", "\\|") for c in used)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
