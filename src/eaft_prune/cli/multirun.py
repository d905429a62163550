"""A multirun: a parent run over its jobs, and one table of how each ended."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eaft_prune.cli import job as runner
from eaft_prune.cli.compose import Invocation
from eaft_prune.core.files import write_atomically
from eaft_prune.core.types import UserError
from eaft_prune.records.result import FILE
from eaft_prune.report.terminal import listing
from eaft_prune.tracking import RunStatus, TrackingError, finish_parent, start_parent

if TYPE_CHECKING:
    from pandas import DataFrame

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
PARENT = "tracking.parent_run_id="  # the override that jobs are given
_FIGURES = ("worst dPPL", "evaluations", "exit code")  # also in the CSV
_COLOURS = {"PASS": "#2a9d4a", "FAIL": "#c8452f", "INCONCLUSIVE": "#d9a514"}


def run_multirun(invocation: Invocation, launch: Callable[[Sequence[str]], int]) -> int:
    """Run every job under one parent run; returns the worst exit code of the jobs."""
    tracking = invocation.experiments[0].tracking
    before = _results(invocation.out)  # of an earlier multirun in the same directory
    try:
        parent = start_parent(tracking, f"multirun {len(invocation.points)} jobs", invocation.typed)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return runner.MISUSED
    code = runner.CRASHED
    try:
        code = launch((*invocation.arguments, f"{PARENT}{parent}"))
    finally:
        stopped = code in (runner.INTERRUPTED, runner.TERMINATED)
        jobs = _jobs(invocation, before, stopped)
        files = _summary(invocation.out, jobs)
        shown = _shown(jobs)
        print(f"\n{listing(list(shown), shown.to_numpy().tolist())}\n")
        for number, why in jobs.loc[jobs["error"] != "", ["job", "error"]].to_numpy():
            print(f"job {number:<7} {why}")  # whole, so that paths can be copied
        print(f"summary     {invocation.out / 'summary.csv'}")
        failed = (jobs["status"] != "FINISHED").any()
        status: RunStatus = "KILLED" if stopped else "FAILED" if failed else "FINISHED"
        try:
            finish_parent(tracking, parent, status, files, _counts(jobs))
        except (TrackingError, UserError) as error:  # the jobs are done: their results stand
            print(f"error: {error}", file=sys.stderr)
            code = code or runner.CRASHED
    if stopped:
        return code
    return max([code, *map(int, jobs["exit code"])])


def _summary(out: Path, jobs: DataFrame) -> list[Path]:
    """Write the table and the plot; returns the files."""
    out.mkdir(parents=True, exist_ok=True)
    sheet = jobs.to_csv(index=False, lineterminator="\r\n")
    texts = {"summary.md": _markdown(jobs), "summary.csv": sheet}
    if (jobs["worst dPPL"] != "").any():
        texts["summary.html"] = _plot(jobs)
    for name, text in texts.items():
        write_atomically(out / name, text)
    return [out / name for name in texts]


def _counts(jobs: DataFrame) -> dict[str, float]:
    return {
        "jobs": len(jobs),
        "jobs/failed": int((jobs["status"] != "FINISHED").sum()),
        "jobs/gate_pass": int((jobs["gate"] == "PASS").sum()),
        "jobs/gate_inconclusive": int((jobs["gate"] == "INCONCLUSIVE").sum()),
        "plans/distinct": jobs.loc[jobs["plan"] != "", "plan"].nunique(),
        "evaluations/run": int(jobs["evaluations"].replace("", 0).sum()),
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
    print(listing(heads, rows))
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


def _jobs(invocation: Invocation, before: Mapping[Path, int], stopped: bool) -> DataFrame:
    """A row a job; what it has not is an empty text."""
    import pandas  # here: importing it takes longer than looking at settings

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
    rows = [
        _row(job, point, found.get(job), missing) for job, point in enumerate(_changed(invocation))
    ]
    return pandas.DataFrame(rows, columns=[*_COLUMNS, *_FIGURES], dtype=object)


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


def _plot(jobs: DataFrame) -> str:
    """One HTML file: each point's dPPL at its worst gate length, coloured by the gate's status."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for status, chosen in jobs[jobs["gate"] != ""].groupby("gate", sort=False):
        figure.add_scatter(
            x=chosen["job"].tolist(),
            y=chosen["worst dPPL"].tolist(),
            customdata=chosen[["overrides", "plan", "failed checks"]].to_numpy().tolist(),
            mode="markers",
            name=status,
            marker={"size": 10, "color": _COLOURS.get(status, "#777777")},
            hovertemplate=(
                "point %{x}: dPPL %{y:+.4f}<br>%{customdata[0]}<br>plan %{customdata[1]}"
                "<br>%{customdata[2]}<extra>" + status + "</extra>"
            ),
        )
    counts = _counts(jobs)
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


def _shown(jobs: DataFrame) -> DataFrame:
    """The columns for people that are not empty, as text."""
    texts = jobs[list(_COLUMNS)].map(str)
    return texts.loc[:, (texts != "").any()]


def _markdown(jobs: DataFrame) -> str:
    shown = _shown(jobs)
    cells = shown.map(lambda cell: cell.replace("|", "\\|")).to_numpy().tolist()
    lines = ["| " + " | ".join(row) + " |" for row in (list(shown), *cells)]
    lines.insert(1, "|" + " --- |" * len(list(shown)))
    return "\n".join(lines) + "\n"
