"""What a run leaves to whoever asked for it: stage records, a task's outcome, the tracked run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eaft_prune.core.types import Checkpoint, Coverage, ExpertScores, KeepPlan
from eaft_prune.core.verdict import Comparison


@dataclass(frozen=True)
class StageRecord:
    """What the store knows of one stage run: emitted to the tracker as each stage ends."""

    stage: str
    key: str
    cached: bool
    seconds: float
    output_digest: str
    path: Path
    facts: Mapping[str, Any]  # small JSON-able summary: tokens, tokens_per_s, bytes ...


@dataclass(frozen=True)
class RunSummary:
    """One run as the tracker keeps it; metrics are the last value of each."""

    run_id: str
    name: str
    status: str  # RUNNING, FINISHED, FAILED, KILLED
    active: bool  # not deleted in the tracker
    started: float  # seconds since 1970
    ended: float | None
    params: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    packs: Mapping[str, str] = field(default_factory=dict)  # sha256 of those read -> path


@dataclass(frozen=True)
class Selection:
    """Why experts went: scores, the plan cut from them, and the settings that made both."""

    criterion: str
    scores: ExpertScores
    plan: KeepPlan
    settings: Mapping[str, Any]  # of pruning; in a search the winner's, not the configured ones
    coverage: Coverage | None = None  # None: nothing was traced


@dataclass(frozen=True)
class Outcome:
    """What a task found; the parts it did not make are None."""

    comparison: Comparison | None = None
    selection: Selection | None = None
    base: Checkpoint | None = None
    checkpoint: Checkpoint | None = None
    evaluations: Mapping[str, Path] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    text: str | None = None  # the facts, for people
    differs: bool = False  # a replay or verification found a difference
