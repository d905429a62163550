"""Runs of the framework from Python, for benchmarks that compare settings."""

from __future__ import annotations

import contextlib
import io
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eaft_prune.checkpoints.families import family_of
from eaft_prune.checkpoints.read import open_model
from eaft_prune.cli.main import check
from eaft_prune.cli.main import main as command
from eaft_prune.config import Experiment
from eaft_prune.core.progress import Bars
from eaft_prune.core.store import Store
from eaft_prune.packs.sources import model_path
from eaft_prune.pipeline.observer import Silent
from eaft_prune.pipeline.session import Resident, Session


def settings(arguments: Sequence[str]) -> Experiment:
    """The one experiment of a command line."""
    (experiment,) = check(arguments).experiments
    return experiment


def n_experts(arguments: Sequence[str]) -> int:
    """Experts a layer of the model that a command line names."""
    config = open_model(model_path(settings(arguments).model)).config
    return family_of(config).n_experts(config)


def session(experiment: Experiment, store: Path, resident: Resident | None = None) -> Session:
    """The working place of one experiment, which tells nobody."""
    bars = Bars(experiment.runtime.progress)
    return Session(experiment, Store(store), Silent(), bars, resident or Resident())


def finished(arguments: Sequence[str], home: Path) -> dict[str, Any]:
    """result.json of a command line that was run in this process; what it prints is dropped.

    Store, checkpoints, tracking and outputs lie under `home`. Raises RuntimeError, with what was
    printed, where it did not end well.
    """
    out = home / "runs" / f"{time.time_ns()}"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        code = command([*arguments, *under(home), f"hydra.run.dir={out}"])
    if code:
        raise RuntimeError(f"exit code {code} of {' '.join(arguments)}:\n{printed.getvalue()}")
    found: dict[str, Any] = json.loads((out / "result.json").read_text())
    return found


def under(home: Path) -> list[str]:
    """Settings that put everything a run leaves under `home`."""
    return [
        "runtime.progress=false", f"tracking.uri=sqlite:///{home}/mlflow.db",
        f"runtime.store_dir={home}/store", f"runtime.checkpoint_dir={home}/checkpoints",
    ]  # fmt: skip
