"""MLflow keeps what happened: runs, stages, datasets, checkpoints, metrics (README.md beside).

Importing this package is quick: mlflow itself is imported when a server is first contacted.
"""

from eaft_prune.tracking.errors import TrackingError
from eaft_prune.tracking.lifecycle import (
    RunStatus,
    Terminated,
    close_stale_runs,
    finish_parent,
    prepare,
    signals_raise,
    start_parent,
    track,
)
from eaft_prune.tracking.run import MlflowRun

__all__ = [
    "MlflowRun",
    "RunStatus",
    "Terminated",
    "TrackingError",
    "close_stale_runs",
    "finish_parent",
    "prepare",
    "signals_raise",
    "start_parent",
    "track",
]
