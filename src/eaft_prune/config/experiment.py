"""Everything one run depends on: the sections, and what must hold between them."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from eaft_prune.config.base import Settings, allowed
from eaft_prune.config.decoding import DecodeSettings
from eaft_prune.config.eval import EvalSettings
from eaft_prune.config.gate import GateSettings
from eaft_prune.config.inputs import ModelSettings, PacksSettings, ProfileSettings
from eaft_prune.config.losses import MarginalSettings
from eaft_prune.config.proof import CompareSettings, ReplaySettings, VerifySettings
from eaft_prune.config.pruning import (
    CompensationSettings,
    ExportSettings,
    ProbeSettings,
    PruningSettings,
)
from eaft_prune.config.resampling import AblateSettings, StabilitySettings
from eaft_prune.config.runtime import (
    EngineSettings,
    RuntimeSettings,
    SweepSettings,
    TrackingSettings,
)
from eaft_prune.config.search import SearchSettings
from eaft_prune.config.upkeep import DoctorSettings, GcSettings, MemoSettings
from eaft_prune.core.types import UNION

TaskName = Literal[
    "pipeline",
    "profile",
    "predownload",
    "prune",
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
    "engine_parity",
    "decode_bench",
    "usage",
    "ablate",
    "stability",
    "memo",
    "doctor",
    "gc",
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
    scores: str | None = None
    """a reap-scores.yaml: the plan is cut from it, nothing is profiled"""
    compare: CompareSettings | None = None
    replay: ReplaySettings | None = None
    verify: VerifySettings | None = None
    search: SearchSettings | None = None
    decode_bench: DecodeSettings | None = None
    ablate: AblateSettings | None = None
    stability: StabilitySettings | None = None
    memo: MemoSettings | None = None
    doctor: DoctorSettings | None = None
    gc: GcSettings | None = None
    sweep: SweepSettings = SweepSettings()
    probe: ProbeSettings = ProbeSettings()
    marginal: MarginalSettings = MarginalSettings()

    @model_validator(mode="after")
    def _consistent(self) -> Experiment:
        if self.pruning.keep_n % self.pruning.keep_multiple:
            raise ValueError(
                f"pruning.keep_n = {self.pruning.keep_n} is not a multiple of "
                f"pruning.keep_multiple = {self.pruning.keep_multiple}"
            )
        task = self.task.name
        exports = task in ("search", "prune") or (
            task == "pipeline" and "pruned" in self.eval.candidates
        )
        if self.pruning.selection != "uniform" and exports and not self.export.pad_ragged:
            raise ValueError(
                f"pruning.selection = {self.pruning.selection!r} lets layers keep unequal numbers "
                "of experts, which a checkpoint cannot hold: use eval.candidates=[masked], or "
                "export.pad_ragged=true"
            )
        evaluates = ("evaluate", "noise_floor", "noop", "search", "ablate")
        if self.eval.top_k is not None and task in evaluates:
            raise ValueError(
                f"eval.top_k = {self.eval.top_k} has no effect with task={task}: use task=pipeline"
            )
        if self.pruning.compensation != "none":
            self._check_compensation()
        if self.eval.top_logprobs and task in ("search", "ablate"):
            raise ValueError(f"eval.top_logprobs = true has no effect with task={task}: drop it")
        self._check_measured()
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
        for pack in self.pruning.pack_weights:
            if pack not in self.packs.files:
                raise ValueError(
                    f"pruning.pack_weights names {pack!r}; {allowed(pack, list(self.packs.files))}"
                )
        if self.gate.pack not in self.eval_packs:
            raise ValueError(
                f"gate.pack = {self.gate.pack!r} is not evaluated; "
                f"{allowed(self.gate.pack, self.eval_packs)}"
            )
        for pack in self.gate.packs:
            if pack not in (*self.eval_packs, "default") or pack == self.gate.pack:
                others = [p for p in (*self.eval_packs, "default") if p != self.gate.pack]
                raise ValueError(
                    f"gate.packs names {pack!r}, beside gate.pack = {self.gate.pack!r} it may name "
                    f"what is evaluated; {allowed(pack, others)}"
                )
        missing = [s for s in self.gate.seq_lens if s not in self.eval.seq_lens]
        if missing:
            raise ValueError(
                f"gate.seq_lens = {list(self.gate.seq_lens)} needs {missing}, but eval.seq_lens = "
                f"{list(self.eval.seq_lens)}"
            )
        if self.eval.early_stop:
            if self.task.name not in ("pipeline", "noise_floor", "noop"):
                raise ValueError(
                    "eval.early_stop = true needs a base, a candidate and their gate: "
                    f"task=pipeline, noise_floor or noop, not {self.task.name}"
                )
            if self.gate.confidence is None or self.eval.seed is None:
                raise ValueError(
                    "eval.early_stop = true needs gate.confidence, and eval.seed so that "
                    "the first blocks are like all others; null: neither may be"
                )
        if self.task.name == "compare" and self.compare is None:
            raise ValueError("task=compare needs compare.base=DIR and compare.candidate=DIR")
        if task == "plan" and self.scores is None:
            raise ValueError("task=plan needs scores=FILE, the reap-scores.yaml of a checkpoint")
        if task == "search" and self.scores is not None:
            raise ValueError("task=search scores experts itself: drop scores")
        if task == "replay" and self.replay is None:
            raise ValueError("task=replay needs replay.lock=FILE, the run.lock.yaml of a run")
        if task == "verify" and self.verify is None:
            raise ValueError("task=verify needs verify.path=DIR, an exported checkpoint")
        if self.engine.name == "sglang":
            self._check_served()
        elif task in ("engine_parity", "usage"):
            raise ValueError(f"task={task} asks an SGLang server: give engine=sglang")
        own = ("search", "ablate", "stability", "memo", "doctor", "gc", "decode_bench")  # sections
        if task in own and getattr(self, task) is None:
            raise ValueError(f"task={task} needs the {task} settings: select it as task={task}")
        if task == "search" and self.packs.split == "none":
            raise ValueError(
                "task=search with packs.split = 'none' leaves no rows that the search has not "
                "seen to confirm its winner on: use packs.split=hash"
            )
        return self

    def _check_compensation(self) -> None:
        level, task = self.pruning.compensation, self.task.name
        asked = f"pruning.compensation = {level!r}"
        if task in ("search", "ablate"):
            raise ValueError(
                f"{asked} changes weights, and task={task} scores plans masked in the base model, "
                "whose weights are as they were: use task=pipeline"
            )
        if task in ("noop", "noise_floor"):
            raise ValueError(
                f"{asked} has no effect with task={task}, which drops nothing: drop it"
            )
        if task == "pipeline" and "masked" in self.eval.candidates:
            raise ValueError(
                f"{asked} changes weights, and a masked candidate has the base's: use "
                "eval.candidates=[pruned]"
            )
        known = [*self.packs.files, UNION]
        if self.compensation.pack not in known:
            raise ValueError(
                f"compensation.pack names {self.compensation.pack!r}; "
                f"{allowed(self.compensation.pack, known)}"
            )
        if self.engine.experts == "kernels":
            raise ValueError(
                f"{asked} needs the experts' activations, which engine.experts = 'kernels' does "
                "not tell: use engine.experts=auto"
            )

    def _check_served(self) -> None:
        """What an SGLang server cannot do."""
        if self.task.name in ("search", "ablate") or "masked" in self.eval.candidates:
            raise ValueError(
                "engine=sglang cannot mask experts (task=search, task=ablate, "
                "eval.candidates=[masked]): use engine=transformers for that"
            )
        if self.eval.top_logprobs:
            raise ValueError("eval.top_logprobs = true needs engine=transformers")
        if self.engine.base_url is not None and self.task.name in ("pipeline", "noop"):
            raise ValueError(
                f"task={self.task.name} evaluates two checkpoints, engine.base_url serves one: "
                "launch servers with engine.python, or use task=evaluate twice and task=compare"
            )
        if self.task.name == "usage":
            if self.engine.python is None:
                raise ValueError("task=usage launches a server that records: give engine.python")
            counts = PruningSettings(name="frequency", saliency="one")
            if self.pruning.scoring != counts.scoring:
                raise ValueError(
                    "task=usage counts selections: use pruning=frequency as it is, not "
                    f"pruning={self.pruning.name}"
                )

    def _check_measured(self) -> None:
        """Raise ValueError where losses measured by masking cannot be had, or stopped."""
        pruning, task = self.pruning, self.task.name
        if pruning.measured or pruning.selection == "marginal_loss":
            key = "saliency" if pruning.measured else "selection"
            what = f"pruning.{key} = {getattr(pruning, key)!r} measures the model"
            if task in ("search", "ablate", "stability"):
                raise ValueError(f"{what}, task={task} only its trace: use task=pipeline")
            if self.profile.early_stop:
                raise ValueError(f"{what}, profile.early_stop = true only its trace: set false")
        if not self.marginal.early_stop or task == "plan":
            return
        core = (pruning.core_pos_top_m, pruning.core_count_top_m, pruning.pack_floor_top_m)
        if pruning.saliency != "leave_one_out" or pruning.selection != "uniform" or any(core):
            raise ValueError(
                "marginal.early_stop = true asks which experts a "
                "cut keeps by their scores alone: it needs pruning.saliency = 'leave_one_out', "
                "pruning.selection = 'uniform', and no core"
            )
        if self.marginal.seed is None:
            raise ValueError(
                "marginal.early_stop = true needs marginal.seed, "
                "so that the first blocks are like all others; null: file order"
            )

    @property
    def eval_packs(self) -> tuple[str, ...]:
        """The packs to evaluate, UNION last unless eval.packs says otherwise."""
        return self.eval.packs or (*self.packs.files, UNION)
