"""A multirun: a parent run over its jobs, and one table of how each ended."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eaft_prune.cli import job as runner
from eaft_prune.config import Experiment
from eaft_prune.core.files import write_atomically
from eaft_prune.core.types import UserError
from eaft_prune.records.result import FILE
from eaft_prune.tracking import RunStatus, TrackingError, finish_parent, start_parent

_COLUMNS = (
    "job",
    "overrides",
    "status",
    "gate",
    "plain",
    "failed checks",
    "undecided checks",
    "dPPL",
    "plan",
    "error",
)
_FIGURES = ("worst dPPL", "evaluations", "exit code")  # also in the CSV
_COLOURS = {"PASS": "#2a9d4a", "FAIL": "#c8452f", "INCONCLUSIVE": "#d9a514"}


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
    before = _results(invocation.out)  # of an earlier multirun in the same directory
    try:
        parent = start_parent(
            tracking, f"multirun {len(invocation.points)} jobs", invocation.arguments
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return runner.MISUSED
    code = runner.CRASHED
    try:
        code = launch((*invocation.arguments, f"tracking.parent_run_id={parent}"))
    finally:
        stopped = code in (runner.INTERRUPTED, runner.TERMINATED)
        rows = _rows(invocation, before, stopped)
        files = _summary(invocation.out, rows)
        print(f"\n{_markdown(rows)}\nsummary     {invocation.out / 'summary.csv'}")
        failed = any(row["status"] != "FINISHED" for row in rows)
        status: RunStatus = "KILLED" if stopped else "FAILED" if failed else "FINISHED"
        try:
            finish_parent(tracking, parent, status, files, _counts(rows))
        except (TrackingError, UserError) as error:  # the jobs are done: their results stand
            print(f"error: {error}", file=sys.stderr)
            code = code or runner.CRASHED
    if stopped:
        return code
    codes = [int(row["exit code"]) for row in rows]
    return max([code, *codes])


def _summary(out: Path, rows: Sequence[dict[str, Any]]) -> list[Path]:
    """Write the table and the plot; returns the files."""
    out.mkdir(parents=True, exist_ok=True)
    texts = {"summary.md": _markdown(rows), "summary.csv": _csv(rows)}
    if any(row["worst dPPL"] != "" for row in rows):
        texts["summary.html"] = _plot(rows)
    for name, text in texts.items():
        write_atomically(out / name, text)
    return [out / name for name in texts]


def _counts(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    return {
        "jobs": len(rows),
        "jobs/failed": sum(row["status"] != "FINISHED" for row in rows),
        "jobs/gate_pass": sum(row["gate"] == "PASS" for row in rows),
        "jobs/gate_inconclusive": sum(row["gate"] == "INCONCLUSIVE" for row in rows),
        "plans/distinct": len({row["plan"] for row in rows if row["plan"]}),
        "evaluations/run": sum(int(row["evaluations"] or 0) for row in rows),
    }


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
    heads = ("point", "overrides", "state", "evaluations", "plan")
    widths = [max(len(row[i]) for row in (heads, *rows)) for i in range(len(heads))]
    for row in (heads, *rows):
        print("  ".join(c.ljust(width) for c, width in zip(row, widths, strict=True)).rstrip())
    print(f"\n{len(rows)} points, {len(first)} distinct plans, {len(missing)} evaluations to run")
    for line in errors:
        print(line, file=sys.stderr)
    return runner.MISUSED if errors else runner.OK


def _changed(invocation: Invocation) -> list[list[str]]:
    """Per point the overrides that not all points share."""
    points = invocation.points
    shared = set.intersection(*map(set, points)) if len(points) > 1 else set()
    return [[o for o in point if o not in shared] for point in points]


def _results(out: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in sorted(out.rglob(FILE))}


def _rows(
    invocation: Invocation, before: Mapping[Path, int], stopped: bool
) -> list[dict[str, Any]]:
    found = {}
    for path, written in _results(invocation.out).items():
        if before.get(path) == written:
            continue
        try:
            value = json.loads(path.read_text())
        except ValueError as error:
            print(f"{path} cannot be read: {error}", file=sys.stderr)
            continue
        found[value["job"]] = value
    missing = "not run: the multirun was stopped" if stopped else "the job left no result.json"
    return [
        _row(job, point, found.get(job), missing) for job, point in enumerate(_changed(invocation))
    ]


def _row(
    job: int, point: Sequence[str], value: dict[str, Any] | None, missing: str
) -> dict[str, Any]:
    row = dict.fromkeys((*_COLUMNS, *_FIGURES), "") | {"job": job, "overrides": " ".join(point)}
    if value is None:
        return row | {"status": "NO RESULT", "error": missing, "exit code": runner.CRASHED}
    gate, plan = value["gate"], value["plan"]
    row |= {
        "status": value["status"],
        "error": (value["error"] or "").splitlines()[0] if value["error"] else "",
        "exit code": value["exit_code"],
        "plan": plan["digest"][:12] if plan else "",
        "evaluations": sum(
            s["stage"].startswith("evaluate/") and not s["cached"] for s in value["stages"]
        ),
    }
    if gate:
        changes = [check["value"] for check in gate["checks"] if check["name"] == "dppl"]
        row |= {
            "gate": gate["status"],
            "plain": gate["plain_status"],
            "failed checks": " ".join(gate["failed_checks"]),
            "undecided checks": " ".join(gate["undecided_checks"]),
            "dPPL": " ".join(f"{change:+.4f}" for change in changes),
            "worst dPPL": max(changes, key=abs),
        }
    return row


def _plot(rows: Sequence[dict[str, Any]]) -> str:
    """One HTML file: each point's dPPL at its worst gate length, coloured by the gate's status."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for status in dict.fromkeys(row["gate"] for row in rows if row["gate"]):
        chosen = [row for row in rows if row["gate"] == status]
        figure.add_scatter(
            x=[row["job"] for row in chosen],
            y=[row["worst dPPL"] for row in chosen],
            customdata=[(row["overrides"], row["plan"], row["failed checks"]) for row in chosen],
            mode="markers",
            name=status,
            marker={"size": 10, "color": _COLOURS.get(status, "#777777")},
            hovertemplate=(
                "point %{x}: dPPL %{y:+.4f}<br>%{customdata[0]}<br>plan %{customdata[1]}"
                "<br>%{customdata[2]}<extra>" + status + "</extra>"
            ),
        )
    counts = _counts(rows)
    figure.update_layout(
        title=f"{counts['jobs']} points, {counts['plans/distinct']} distinct plans, "
        f"{counts['jobs/gate_pass']} pass, {counts['jobs/gate_inconclusive']} inconclusive, "
        f"{counts['jobs/failed']} failed to run",
        xaxis_title="point",
        yaxis_title="dPPL, worst gate length",
        template="plotly_white",
    )
    page: str = figure.to_html(include_plotlyjs=True)
    return page


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, [*_COLUMNS, *_FIGURES])
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
