"""What goes wrong between a run and MLflow."""

from __future__ import annotations


class TrackingError(RuntimeError):
    """MLflow stopped taking what a run has to say; the message names the server and the reason."""
