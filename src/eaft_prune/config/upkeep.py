"""Settings of the tasks that look after what runs leave behind."""

from __future__ import annotations

from pydantic import Field

from eaft_prune.config.base import NonNegative, Settings


class MemoSettings(Settings):
    """Which finished runs the decision memo is written from."""

    experiment: str | None = None  # of MLflow; null: tracking.experiment
    filter: str = ""  # MLflow's own filter: params.`model.name` = 'gpt_oss_20b'


class DoctorSettings(Settings):
    """What task=doctor may do besides looking."""

    mend: bool = False  # close zombie runs, remove what dead runs left half-written


class GcSettings(Settings):
    """What task=gc may remove."""

    delete: bool = False  # false: say what would go
    older_than_days: NonNegative = 7  # whatever is younger stays
    lockfiles: tuple[str, ...] = Field(default=("outputs", "multirun"))  # searched for *.lock.yaml
