"""Settings of what is cut and where it is written."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from eaft_prune.config.base import (
    BlockCount,
    Fraction,
    Limit,
    Name,
    NonNegative,
    Positive,
    Settings,
)
from eaft_prune.config.runtime import EngineSettings
from eaft_prune.core.types import UNION

Saliency = Literal[
    "one", "gate", "norm", "norm2", "gate_norm", "random", "leave_one_out", "greedy", "custom"
]
Regions = Literal["strict", "policy", "soft"]
Sampling = Literal["global", "per_file", "per_file_weighted"]
SelectionRule = Literal["uniform", "effective_number", "coverage", "marginal_loss"]

# what only the plan depends on: not part of a score's key
PLAN_SETTINGS = (
    "keep_n",
    "keep_multiple",
    "selection",
    "min_keep_n",
    "max_keep_n",
    "coverage",
    "core_pos_top_m",
    "core_count_top_m",
    "pack_floor_top_m",
)
_AFTER = ("compensation",)  # what is done to the experts that a plan keeps


class PruningSettings(Settings):
    """How experts are scored and how many stay (docs/definitions.md)."""

    name: Name
    """label of the criterion in reports"""
    keep_n: Positive = 28
    """experts a layer keeps; on average if layers differ, at most with selection=coverage"""
    saliency: Saliency = "gate_norm"
    """what a selection of the expert counts, or how its loss is measured"""
    weight: Literal["uniform", "eaft"] = "uniform"
    """of a token; eaft: by its region"""
    reduce: Literal["sum", "mean"] = "sum"
    """over selections of weight x saliency; higher = keep"""
    regions: Regions = "strict"
    """how tokens are told apart for weight=eaft"""
    quantile: Fraction = 0.15
    """of probability and entropy, where regions part"""
    high_quantile: Fraction = 0.85
    """of entropy, for regions=policy"""
    soft_width: Annotated[float, Field(gt=0)] = 0.05
    """of regions=soft: how gradual its steps are, as a share of the tokens"""
    w_good: float = 1.0
    """weight of a good token"""
    w_uncertain: float = 0.25
    """weight of an uncertain token"""
    w_conflict: float = -2.0
    """weight of a confident conflict"""
    sampling: Sampling = "global"
    """global: each token counts 1; per_file: each pack as much as any other"""
    pack_weights: dict[str, Limit] = Field(default_factory=dict)
    """{pack: weight} with global and per_file_weighted; a pack not named weighs 1"""
    keep_multiple: Positive = 4
    """numbers kept are multiples of it (MXFP4 MoE kernels)"""
    selection: SelectionRule = "uniform"
    """keep_n a layer; effective_number, marginal_loss: on average; coverage: at most"""
    min_keep_n: Positive | None = None
    """a layer, where layers may differ; null: keep_multiple"""
    max_keep_n: Positive | None = None
    """a layer, of selection=effective_number and marginal_loss; null: all experts"""
    coverage: Annotated[float, Field(gt=0, le=1)] = 0.9
    """of selection=coverage: share of each pack's positive mass that stays"""
    core_pos_top_m: NonNegative = 4
    """experts kept for their positive mass, before ranking"""
    core_count_top_m: NonNegative = 0
    """experts kept for their count, before ranking"""
    pack_floor_top_m: NonNegative = 0
    """experts kept for their positive mass in each pack, before ranking"""
    seed: NonNegative = 0
    """of saliency=random"""
    function: str | None = None
    """of saliency=custom: module:name, from a trace to scores [layers, experts]"""
    compensation: Literal["none", "bias", "down_proj", "experts"] = "none"
    """what of the kept experts is refitted to make up for the dropped ones"""

    @model_validator(mode="after")
    def _has_effect(self) -> PruningSettings:
        if self.sampling == "per_file" and self.pack_weights:
            raise ValueError(
                f"pruning.pack_weights = {self.pack_weights} has no effect with pruning.sampling = "
                "'per_file': use per_file_weighted or global"
            )
        if self.measured and (self.weight != "uniform" or self.sampling != "global"):
            raise ValueError(
                f"pruning.weight = {self.weight!r} and pruning.sampling = {self.sampling!r}: a "
                f"measured loss ({self.saliency}) has no weights; use uniform and global"
            )
        if self.measured and self.pack_weights:
            raise ValueError(
                f"pruning.pack_weights = {self.pack_weights} has no effect on a measured loss "
                f"({self.saliency}): drop it"
            )
        if self.selection == "uniform" and self.min_keep_n is not None:
            raise ValueError(
                f"pruning.min_keep_n = {self.min_keep_n} has no effect with pruning.selection = "
                "'uniform': use effective_number, marginal_loss or coverage"
            )
        fixed_total = ("effective_number", "marginal_loss")
        if self.selection not in fixed_total and self.max_keep_n is not None:
            raise ValueError(
                f"pruning.max_keep_n = {self.max_keep_n} has no effect with pruning.selection = "
                f"{self.selection!r}: use effective_number or marginal_loss, or keep_n"
            )
        if (self.saliency == "custom") != (self.function is not None):
            raise ValueError(
                f"pruning.function = {self.function!r} and pruning.saliency = {self.saliency!r}: "
                "a function of your own goes with pruning=custom, and only with it"
            )
        if self.function is not None and (self.weight != "uniform" or self.sampling != "global"):
            raise ValueError(
                f"pruning.weight = {self.weight!r} and pruning.sampling = {self.sampling!r}: a "
                "function of your own weighs tokens itself; use uniform and global"
            )
        return self

    @property
    def measured(self) -> bool:
        """Whether scores are losses measured by masking, not sums over a routing trace."""
        return self.saliency in ("leave_one_out", "greedy")

    @property
    def scoring(self) -> dict[str, Any]:
        """The settings that scores depend on; the others say how a plan is cut from them."""
        absent = {"function"} if self.function is None else set()
        return self.model_dump(exclude={"name", *PLAN_SETTINGS, *_AFTER, *absent})


class CompensationSettings(Settings):
    """How pruning.compensation solves for its changes, and on which blocks of profiling rows."""

    pack: str = UNION
    """whose profiling rows; or one pack"""
    num_blocks: BlockCount = 64
    """of profile.seq_len tokens; all: as many as the rows give"""
    seed: NonNegative = 0
    """which rows, and which of them are held out"""
    token_weights: Literal["robust", "uniform"] = "robust"
    """robust: less for tokens far off, which are few and outweigh all others"""
    ridge: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    """auto: 0.003 .. 1, chosen layer by layer on held-out rows"""
    passes: Positive = 2
    """over all layers, at most: the last is not taken where held-out rows lose by it"""
    iterations: Positive = 8
    """of conjugate gradients, at most, for gate_up_proj (pruning.compensation=experts)"""
    rounding: Literal["feedback", "nearest"] = "feedback"
    """to MXFP4; feedback: errors handed on"""


class ProbeSettings(Settings):
    """Which layer task=io_probe writes."""

    layer: NonNegative = 0
    """counted from 0"""


class ExportSettings(Settings):
    """Where the pruned checkpoint is written and how large its shards may be."""

    path: str | None = None
    """null: MODEL-BASE-keepN-PLAN in runtime.checkpoint_dir"""
    max_shard_bytes: Positive = 5_000_000_000
    """of each safetensors file"""
    pad_ragged: bool = False
    """write layers of unequal size, filled up with experts the router never picks"""
    sign: str | None = None
    """file of a private Ed25519 key (PEM): manifest.json.sig is written with it"""
    smoke: tuple[EngineSettings, ...] = ()
    """engines beside the one that evaluates that are to write ten tokens with it"""

    @field_validator("smoke")
    @classmethod
    def _launched(cls, smoke: tuple[EngineSettings, ...]) -> tuple[EngineSettings, ...]:
        for engine in smoke:
            if engine.name == "transformers":
                raise ValueError("the others are compared with transformers: drop it")
            if engine.base_url is not None:
                raise ValueError(
                    f"no server serves a checkpoint that is yet to be written: give {engine.name} "
                    "a python, to launch one, and no base_url"
                )
        return smoke
