"""Settings of the tasks that look after what runs leave behind."""

from __future__ import annotations

from eaft_prune.config.base import NonNegative, Settings


class MemoSettings(Settings):
    """Which finished runs the decision memo is written from."""

    experiment: str | None = None
    """of MLflow; null: tracking.experiment"""
    filter: str = ""
    """MLflow's own, such as 'memo.filter=params."model.name" = "gpt_oss_20b"'; empty: every run"""


class DoctorSettings(Settings):
    """What task=doctor may do besides looking."""

    mend: bool = False
    """close zombie runs and remove what dead runs left half-written"""


class GcSettings(Settings):
    """What task=gc may remove."""

    delete: bool = False
    """remove; false: only say what would go"""
    older_than_days: NonNegative = 7
    """whatever is younger stays"""
    lockfiles: tuple[str, ...] = ("outputs", "multirun")
    """directories searched for *.lock.yaml; what those name stays"""
