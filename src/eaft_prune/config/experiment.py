"""Everything one run depends on: the sections, and what must hold between them."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from eaft_prune.config.base import Settings, allowed
from eaft_prune.config.evaluation import CompareSettings, EvalSettings, GateSettings
from eaft_prune.config.inputs import ModelSettings, PacksSettings, ProfileSettings
from eaft_prune.config.proof import ReplaySettings, VerifySettings
from eaft_prune.config.pruning import (
    CompensationSettings,
    ExportSettings,
    ProbeSettings,
    PruningSettings,
)
from eaft_prune.config.runtime import (
    EngineSettings,
    RuntimeSettings,
    SweepSettings,
    TrackingSettings,
)
from eaft_prune.config.search import SearchSettings
from eaft_prune.types import UNION

TaskName = Literal[
    "pipeline",
    "profile",
    "evaluate",
    "compare",
    "noise_floor",
    "noop",
    "expert_math",
    "io_probe",
    "search",
    "plan",
    "replay",
    "verify",
]


class TaskSettings(Settings):
    name: TaskName


class Experiment(Settings):
    """Everything one run depends on."""

    task: TaskSettings
    model: ModelSettings
    packs: PacksSettings
    profile: ProfileSettings
    pruning: PruningSettings
    compensation: CompensationSettings = CompensationSettings()
    export: ExportSettings
    eval: EvalSettings
    gate: GateSettings
    engine: EngineSettings
    tracking: TrackingSettings
    runtime: RuntimeSettings
    scores: str | None = None  # a reap-scores.yaml to cut plans from, instead of a profile
    compare: CompareSettings | None = None
    replay: ReplaySettings | None = None
    verify: VerifySettings | None = None
    search: SearchSettings | None = None
    sweep: SweepSettings = SweepSettings()
    probe: ProbeSettings = ProbeSettings()

    @model_validator(mode="after")
    def _consistent(self) -> Experiment:
        if self.pruning.keep_n % self.pruning.keep_multiple:
            raise ValueError(
                f"pruning.keep_n = {self.pruning.keep_n} is not a multiple of "
                f"pruning.keep_multiple = {self.pruning.keep_multiple}"
            )
        known = [*self.packs.files, UNION]
        for pack in self.eval_packs:
            if pack not in known:
                raise ValueError(f"eval.packs names {pack!r}; {allowed(pack, known)}")
        if isinstance(self.eval.num_blocks, dict):
            for pack in self.eval.num_blocks:
                if pack not in (*known, "default"):
                    raise ValueError(
                        f"eval.num_blocks names {pack!r}; {allowed(pack, [*known, 'default'])}"
                    )
        if self.gate.pack not in self.eval_packs:
            raise ValueError(
                f"gate.pack = {self.gate.pack!r} is not evaluated; "
                f"{allowed(self.gate.pack, self.eval_packs)}"
            )
        missing = [s for s in self.gate.seq_lens if s not in self.eval.seq_lens]
        if missing:
            raise ValueError(
                f"gate.seq_lens = {list(self.gate.seq_lens)} needs {missing}, but eval.seq_lens = "
                f"{list(self.eval.seq_lens)}"
            )
        if self.task.name == "compare" and self.compare is None:
            raise ValueError("task=compare needs compare.base=DIR and compare.candidate=DIR")
        if self.task.name == "plan" and self.scores is None:
            raise ValueError("task=plan needs scores=FILE, the reap-scores.yaml of a checkpoint")
        if self.task.name == "search" and self.scores is not None:
            raise ValueError("task=search scores experts itself: drop scores")
        if self.task.name == "replay" and self.replay is None:
            raise ValueError("task=replay needs replay.lock=FILE, the run.lock.yaml of a run")
        if self.task.name == "verify" and self.verify is None:
            raise ValueError("task=verify needs verify.path=DIR, an exported checkpoint")
        if self.task.name == "search":
            if self.search is None:
                raise ValueError("task=search needs the search settings: select it as task=search")
            if self.packs.split == "none":
                raise ValueError(
                    "task=search with packs.split = 'none' leaves no rows that the search has not "
                    "seen to confirm its winner on: use packs.split=hash"
                )
        return self

    @property
    def eval_packs(self) -> tuple[str, ...]:
        """The packs to evaluate, UNION last unless eval.packs says otherwise."""
        return self.eval.packs or (*self.packs.files, UNION)
