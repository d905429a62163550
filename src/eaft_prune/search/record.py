"""What a study leaves for people: a table of its trials, and plots."""

from __future__ import annotations

import html
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
from optuna import visualization as draw
from optuna.trial import FrozenTrial

from eaft_prune.core.files import write_atomically
from eaft_prune.pipeline.session import Session
from eaft_prune.search.trials import complete


def write_trials(session: Session, out: Path, study: optuna.Study) -> None:
    """trials.csv and plots.html, as files of the run and artifacts."""
    home = out / "search"
    home.mkdir(exist_ok=True)
    write_atomically(home / "trials.csv", _csv(study))
    with warnings.catch_warnings():
        # few or equal values make an importance plot dull, not wrong
        warnings.simplefilter("ignore", UserWarning)
        write_atomically(home / "plots.html", _page(study))
    session.observer.artifact(home)


def _page(study: optuna.Study) -> str:
    """Every plot in one file that fetches nothing: where artifacts are shown, no other is found."""
    from plotly.offline import get_plotlyjs

    parts = [
        f'<section id="{name}">{figure.to_html(full_html=False, include_plotlyjs=False)}</section>'
        for name, figure in _plots(study)
    ]
    script = f"<script>{get_plotlyjs()}</script>"
    title = f"<title>{html.escape(study.study_name)}</title>"
    head = f'<head><meta charset="utf-8">{title}{script}</head>'
    return f"<!doctype html><html>{head}<body>{''.join(parts)}</body></html>"


def _csv(study: optuna.Study) -> str:
    from pandas import DataFrame

    rows = [
        {
            "trial": trial.number,
            "state": trial.state.name,
            **dict(zip(study.user_attrs["objectives"], trial.values or [], strict=False)),
            **trial.params,
            "plan": trial.user_attrs.get("plan", "")[:12],
            "seconds": trial.duration.total_seconds() if trial.duration else "",
            "error": trial.user_attrs.get("error", ""),
        }
        for trial in study.get_trials(deepcopy=False)
    ]
    table: str = DataFrame(rows, dtype=object).to_csv(index=False, lineterminator="\r\n")
    return table


def _plots(study: optuna.Study) -> Iterator[tuple[str, Any]]:
    done = complete(study)
    for index, objective in enumerate(study.user_attrs["objectives"]):

        def value(trial: FrozenTrial, index: int = index) -> float:
            return float(trial.values[index])

        named = {"target": value, "target_name": objective}
        yield f"history_{objective}", draw.plot_optimization_history(study, **named)
        yield f"parallel_{objective}", draw.plot_parallel_coordinate(study, **named)
        if len({value(trial) for trial in done}) > 1 and len(done) >= 4:
            evaluator = optuna.importance.PedAnovaImportanceEvaluator()
            yield (
                f"importance_{objective}",
                draw.plot_param_importances(study, evaluator=evaluator, **named),
            )
    if len(study.directions) in (2, 3):
        yield "pareto", draw.plot_pareto_front(study, target_names=study.user_attrs["objectives"])
