"""The jobs of a multirun side by side: a table, repeats over seeds, a plot."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from eaft_prune.report.text import number

if TYPE_CHECKING:
    from pandas import DataFrame

GROWTH, LIMIT = "ΔPPL %", "limit %"
_CHANGES = {"dcc_rate": "ΔCC rate", "dmean_prob": "Δ mean p", "js2d": "JS2D"}
_FIRST = ("job", "overrides", "status", "verdict")
_SHOWN = (*_FIRST, GROWTH, *_CHANGES.values(), "failed checks", "plan")
# in the sheet alone
_OTHERS = (LIMIT, "plain", "undecided checks", "error", "evaluations", "exit code")
_COLOURS = {"PASS": "#2a9d4a", "FAIL": "#c8452f", "INCONCLUSIVE": "#d9a514"}
_SEED = re.compile(r"^[\w.]*seed=")  # an override that only draws anew


def frame(rows: Sequence[Mapping[str, Any]]) -> DataFrame:
    """A row a job; what it has not is an empty text."""
    import pandas  # here: importing it takes longer than looking at settings

    columns = [*_SHOWN, *_OTHERS]
    return pandas.DataFrame(list(rows), columns=columns, dtype=object).fillna("")


def row(job: int, point: Sequence[str], value: Mapping[str, Any]) -> dict[str, Any]:
    """What a job's result.json says: the verdict, and of every kind of check the largest change."""
    gate, plan, error = value["gate"], value["plan"], value["error"]
    found = {
        "job": job,
        "overrides": " ".join(point),
        "status": value["status"],
        "error": error.splitlines()[0] if error else "",
        "exit code": value["exit_code"],
        "plan": plan["digest"][:12] if plan else "",
        "evaluations": sum(
            s["stage"].startswith("evaluate/") and not s["cached"] for s in value["stages"]
        ),
    }
    if not gate:
        return found
    found |= {
        "verdict": gate["status"],
        "plain": gate["plain_status"],
        "failed checks": " ".join(gate["failed_checks"]),
        "undecided checks": " ".join(gate["undecided_checks"]),
    }
    for name, head in _CHANGES.items():
        found[head] = max(
            (_read(check) for check in gate["checks"] if check["name"] == name),
            key=abs,
            default="",
        )
    growths = [_growth(value, check) for check in gate["checks"] if check["name"] == "dppl"]
    if growths:
        found[GROWTH], found[LIMIT] = max(growths, key=lambda pair: abs(pair[0]))
    return found


def repeats(jobs: DataFrame) -> DataFrame:
    """Points that differ in seeds alone: runs, passes, mean and standard deviation of ΔPPL %."""
    import pandas

    judged = jobs[jobs[GROWTH] != ""]
    settings = judged["overrides"].map(_without_seeds)
    found = [
        {
            "settings": name or "as they are",
            "runs": len(of),
            "passes": int((of["verdict"] == "PASS").sum()),
            f"mean {GROWTH}": of[GROWTH].astype(float).mean(),
            "sd": of[GROWTH].astype(float).std(ddof=1),
            "worst": max(of[GROWTH], key=abs),
        }
        for name, of in judged.groupby(settings, sort=False)
        if len(of) > 1 and (of["overrides"] != name).any()
    ]
    return pandas.DataFrame(found)


def counts(jobs: DataFrame) -> dict[str, float]:
    """Numbers of the whole: jobs by how they ended, distinct plans, spread of ΔPPL %."""
    growth = jobs.loc[jobs[GROWTH] != "", GROWTH].astype(float)
    found = {
        "summary/jobs": len(jobs),
        "summary/jobs_failed": int((jobs["status"] != "FINISHED").sum()),
        "summary/jobs_pass": int((jobs["verdict"] == "PASS").sum()),
        "summary/jobs_inconclusive": int((jobs["verdict"] == "INCONCLUSIVE").sum()),
        "summary/plans": jobs.loc[jobs["plan"] != "", "plan"].nunique(),
        "telemetry/evaluations": int(jobs["evaluations"].replace("", 0).sum()),
    }
    if len(growth):
        found |= {"summary/dppl_percent_mean": growth.mean(), "summary/dppl_percent": growth.max()}
    if len(growth) > 1:
        found["summary/dppl_percent_sd"] = growth.std(ddof=1)
    return found


def shown(table: DataFrame) -> DataFrame:
    """The columns for people that are not empty, as text."""
    heads = [head for head in table if head not in _OTHERS]
    texts = table[heads].apply(lambda cells: cells.map(lambda cell: _text(str(cells.name), cell)))
    return texts.loc[:, (texts != "").any()]


def markdown(jobs: DataFrame) -> str:
    """Table of the jobs, errors whole, and of repeats if there are any."""
    parts = ["# Multirun", "", *_table(shown(jobs)), ""]
    for number_, why in jobs.loc[jobs["error"] != "", ["job", "error"]].to_numpy():
        parts.append(f"- job {number_}: `{why}`")
    again = repeats(jobs)
    if len(again):
        parts += ["", "## Repeats", "", *_table(shown(again)), ""]
    note = "ΔPPL is that of the gate's length at which it is largest, as are the other changes."
    return "\n".join([*parts, "", note, ""])


def plot(jobs: DataFrame) -> str:
    """One HTML file: each point's ΔPPL in percent beside its limit, coloured by its verdict."""
    import plotly.graph_objects as go

    figure = go.Figure()
    judged = jobs[jobs[GROWTH] != ""]
    for status, chosen in judged.groupby("verdict", sort=False):
        figure.add_scatter(
            x=[_place(job, point) for job, point in chosen[["job", "overrides"]].to_numpy()],
            y=chosen[GROWTH].tolist(),
            customdata=chosen[["plan", "failed checks"]].to_numpy().tolist(),
            mode="markers",
            name=status,
            marker={"size": 11, "color": _COLOURS.get(str(status), "#777777")},
            hovertemplate="%{x}<br>ΔPPL %{y:+.2f}%<br>plan %{customdata[0]}<br>%{customdata[1]}"
            f"<extra>{status}</extra>",
        )
    figure.add_scatter(
        x=[_place(job, point) for job, point in judged[["job", "overrides"]].to_numpy()],
        y=judged[LIMIT].tolist(),
        mode="lines",
        name="limit",
        line={"color": "#777777", "dash": "dash"},
        hovertemplate="limit %{y:.2f}%<extra></extra>",
    )
    total = counts(jobs)
    figure.update_layout(
        title=f"{total['summary/jobs']} jobs, {total['summary/plans']} distinct plans: "
        f"{total['summary/jobs_pass']} pass, {total['summary/jobs_inconclusive']} inconclusive, "
        f"{total['summary/jobs_failed']} failed to run",
        xaxis={
            "title": "",
            "type": "category",
            "categoryorder": "array",
            "categoryarray": [
                _place(job, point) for job, point in jobs[["job", "overrides"]].to_numpy()
            ],
        },
        yaxis={"title": "ΔPPL against the base, %", "ticksuffix": "%"},
        template="plotly_white",
    )
    page: str = figure.to_html(include_plotlyjs=True)
    return page


def _read(check: Mapping[str, Any]) -> float:
    return float(check["value"] if check["estimate"] is None else check["estimate"])


def _growth(value: Mapping[str, Any], check: Mapping[str, Any]) -> tuple[float, float]:
    """A check of dPPL and its limit, in percent of the base's PPL."""
    reports = value["reports"]
    base = next(iter(reports.values()))[check["pack"]][str(check["seq_len"])]["ppl"]
    return 100 * check["value"] / base, 100 * check["limit"] / base


def _without_seeds(overrides: str) -> str:
    return " ".join(part for part in overrides.split() if not _SEED.match(part))


def _place(job: int, overrides: str) -> str:
    return f"{job}: {overrides}" if overrides else str(job)


def _text(head: str, cell: Any) -> str:
    if not isinstance(cell, float):
        return str(cell)
    if cell != cell:
        return ""
    return number(cell, 2 if "%" in head or head in ("sd", "worst") else 4, signed=head != "sd")


def _table(texts: DataFrame) -> list[str]:
    cells = texts.map(lambda cell: cell.replace("|", "\\|")).to_numpy().tolist()
    lines = ["| " + " | ".join(row) + " |" for row in (list(texts), *cells)]
    return [lines[0], "|" + " --- |" * len(list(texts)), *lines[1:]]
