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
from eaft_prune.config import TrackingSettings
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
    tracking: TrackingSettings


def run_multirun(invocation: Invocation, launch: Callable[[Sequence[str]], int]) -> int:
    """Run every job under one parent run; returns the worst exit code of the jobs."""
    tracking = invocation.tracking
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


def _rows(invocation: Invocation) -> list[dict[str, Any]]:
    found = {}
    for path in sorted(invocation.out.rglob(FILE)):
        try:
            value = json.loads(path.read_text())
        except ValueError as error:
            print(f"{path} cannot be read: {error}", file=sys.stderr)
            continue
        found[value["job"]] = value
    shared = set.intersection(*map(set, invocation.points)) if len(invocation.points) > 1 else set()
    return [
        _row(job, [o for o in point if o not in shared], found.get(job))
        for job, point in enumerate(invocation.points)
    ]


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
