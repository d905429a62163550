"""What a running pipeline tells whoever watches: each call comes as soon as its fact is known."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from eaft_prune.core.outcome import StageRecord
from eaft_prune.core.types import Checkpoint, EvalKey, KeepPlan
from eaft_prune.core.verdict import GateVerdict, PackReport


class Silent:
    """An observer nobody listens to: for looking without recording."""

    run_id = ""

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


class Aside(Silent):
    """Tells another observer of stages and packs alone: of what was tried, not what came of it."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer

    def stage(self, record: StageRecord) -> None:
        """A stage ended or was found in the store."""
        self._observer.stage(record)

    def dataset(self, name: str, source: str, digest: str, rows: int) -> None:
        """A pack was read."""
        self._observer.dataset(name, source, digest, rows)


class Observer(Protocol):
    """The tracker's side of the seam; the pipeline knows no tracker."""

    def stage(self, record: StageRecord) -> None:
        """A stage ended or was found in the store."""

    def needs(self, name: str, digest: str) -> None:
        """What is made from this output is needed as the run's stages are: too much to name."""

    def dataset(self, name: str, source: str, digest: str, rows: int) -> None:
        """A pack was read."""

    def checkpoint(
        self,
        role: str,
        checkpoint: Checkpoint,
        parent: Checkpoint | None = None,
        how: Mapping[str, Any] | None = None,
    ) -> None:
        """A model is used (role `base`) or was written (role `pruned`, with its base as parent).

        `how` it was made: criterion and settings, nested.
        """

    def plan(self, plan: KeepPlan) -> None:
        """The keep plan is decided."""

    def reports(
        self,
        model: str,
        reports: Mapping[EvalKey, PackReport],
        base: Mapping[EvalKey, PackReport] | None,
    ) -> None:
        """A model was evaluated; `base` holds the base model's reports if it is a candidate."""

    def verdict(self, verdict: GateVerdict) -> None:
        """The gate decided."""

    def beside(self, verdict: GateVerdict) -> None:
        """The gate that stands beside decided."""

    @property
    def run_id(self) -> str:
        """The tracked run, for processes that join it."""

    def point(
        self,
        name: str,
        settings: Mapping[str, Any],
        metrics: Mapping[str, float],
        tags: Mapping[str, str],
    ) -> None:
        """One point of a search ended: a child of the run."""

    def facts(self, facts: Mapping[str, Any]) -> None:
        """Numbers of a task that has no reports, by name."""

    def artifact(self, path: Path) -> None:
        """A file or directory worth keeping with the run."""
