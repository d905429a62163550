"""Everything one run depends on: the sections, and what must hold between them."""

from __future__ import annotations

from pydantic import model_validator

from eaft_prune.config.base import Settings, allowed
from eaft_prune.config.decoding import DecodeSettings
from eaft_prune.config.eval import EvalSettings
from eaft_prune.config.frontier import FrontierSettings
from eaft_prune.config.gate import GateSettings
from eaft_prune.config.generation import GenerationSettings
from eaft_prune.config.harness import HarnessSettings
from eaft_prune.config.inputs import ModelSettings, PacksSettings, ProfileSettings
from eaft_prune.config.losses import MarginalSettings
from eaft_prune.config.proof import (
    CandidateSettings,
    CompareSettings,
    ReplaySettings,
    VerifySettings,
)
from eaft_prune.config.pruning import (
    CompensationSettings,
    ExportSettings,
    ProbeSettings,
    PruningSettings,
)
from eaft_prune.config.publish import PublishSettings
from eaft_prune.config.resampling import AblateSettings, StabilitySettings
from eaft_prune.config.runtime import (
    EngineSettings,
    GgufSettings,
    RuntimeSettings,
    SweepSettings,
    TrackingSettings,
)
from eaft_prune.config.search import SearchSettings
from eaft_prune.config.upkeep import DoctorSettings, GcSettings, MemoSettings
from eaft_prune.core.types import UNION

_SHARED = ("pack", "seq_lens", "confidence", "rarest")  # by both gates


class TaskSettings(Settings):
    name: str  # one of tasks.TASKS


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
    beside: GateSettings | None = None
    """a second gate, whose verdict stands beside: of the pack, lengths and confidence of gate"""
    generation: GenerationSettings = GenerationSettings()
    harness: HarnessSettings = HarnessSettings()
    engine: EngineSettings
    gguf: GgufSettings = GgufSettings()
    tracking: TrackingSettings
    runtime: RuntimeSettings
    scores: str | None = None
    """a reap-scores.yaml: the plan is cut from it, nothing is profiled"""
    speeds: str | None = None
    """a decode_bench.json of base and checkpoint: the report opens with its rates"""
    compare: CompareSettings | None = None
    replay: ReplaySettings | None = None
    verify: VerifySettings | None = None
    search: SearchSettings | None = None
    frontier: FrontierSettings | None = None
    candidate: CandidateSettings | None = None
    decode_bench: DecodeSettings | None = None
    ablate: AblateSettings | None = None
    stability: StabilitySettings | None = None
    publish: PublishSettings | None = None
    memo: MemoSettings | None = None
    doctor: DoctorSettings | None = None
    gc: GcSettings | None = None
    sweep: SweepSettings = SweepSettings()
    probe: ProbeSettings = ProbeSettings()
    marginal: MarginalSettings = MarginalSettings()

    @property
    def second_gate(self) -> GateSettings | None:
        """`beside` as it is judged, unless the gate is that: a comparison has one confidence."""
        if self.beside is None or self.beside.name == self.gate.name:
            return None
        shared = {name: getattr(self.gate, name) for name in _SHARED}
        return self.beside.model_copy(update=shared)

    @model_validator(mode="after")
    def _consistent(self) -> Experiment:
        if self.pruning.keep_n % self.pruning.keep_multiple:
            raise ValueError(
                f"pruning.keep_n = {self.pruning.keep_n} is not a multiple of "
                f"pruning.keep_multiple = {self.pruning.keep_multiple}"
            )
        for name in ("core_pos_top_m", "core_count_top_m", "pack_floor_top_m"):
            if (core := getattr(self.pruning, name)) > self.pruning.keep_n:
                raise ValueError(
                    f"pruning.{name} = {core} is more than pruning.keep_n = {self.pruning.keep_n}: "
                    f"it must be in 0..{self.pruning.keep_n}"
                )
        if self.pruning.compensation != "none":
            self._check_compensation()
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
        unsure = self.gate.confidence is None or self.eval.seed is None
        if self.eval.early_stop and unsure:
            raise ValueError(
                "eval.early_stop = true needs gate.confidence, and eval.seed so that "
                "the first blocks are like all others; null: neither may be"
            )
        return self

    def _check_compensation(self) -> None:
        asked = f"pruning.compensation = {self.pruning.compensation!r}"
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

    def _check_measured(self) -> None:
        """Raise ValueError where losses measured by masking cannot be had, or stopped."""
        pruning = self.pruning
        if pruning.measured or pruning.selection == "marginal_loss":
            key = "saliency" if pruning.measured else "selection"
            what = f"pruning.{key} = {getattr(pruning, key)!r} measures the model"
            if self.profile.early_stop:
                raise ValueError(f"{what}, profile.early_stop = true only its trace: set false")
        if not self.marginal.early_stop or self.scores is not None:
            return  # nothing is measured
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
