"""Settings of what is cut and where it is written."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from eaft_prune.config.base import Fraction, Limit, NonNegative, Positive, Settings
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
    """How experts are scored and how many stay (DESIGN section 2: Score, Regions, Keep plan)."""

    name: str
    keep_n: Positive  # a layer; on average if layers differ, at most with coverage
    saliency: Saliency
    weight: Literal["uniform", "eaft"]
    reduce: Literal["sum", "mean"]
    regions: Regions = "strict"
    quantile: Fraction = 0.15
    high_quantile: Fraction = 0.85
    soft_width: Annotated[float, Field(gt=0)] = 0.05  # of regions=soft, as a share of the tokens
    w_good: float = 1.0
    w_uncertain: float = 0.25
    w_conflict: float = -2.0
    sampling: Sampling = "global"
    pack_weights: dict[str, Limit] = Field(default_factory=dict)  # a pack not named weighs 1
    keep_multiple: Positive = 4
    selection: SelectionRule = "uniform"
    min_keep_n: Positive | None = None  # null: keep_multiple
    max_keep_n: Positive | None = None  # null: all experts
    coverage: Annotated[float, Field(gt=0, le=1)] = 0.9
    core_pos_top_m: NonNegative = 4
    core_count_top_m: NonNegative = 0
    pack_floor_top_m: NonNegative = 0
    seed: NonNegative = 0  # of saliency=random
    function: str | None = None  # of saliency=custom: module:name, from a trace to scores [L, E]
    compensation: Literal["none", "bias", "down_proj", "experts"] = "none"

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

    pack: str = UNION  # whose profiling rows
    num_blocks: Positive = 64  # of profile.seq_len tokens
    seed: NonNegative = 0  # which rows, and which of them are held out
    token_weights: Literal["robust", "uniform"] = "robust"
    ridge: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"  # auto: on held-out rows
    iterations: Positive = 20  # of conjugate gradients, for gate_up_proj (compensation=experts)
    rounding: Literal["feedback", "nearest"] = "feedback"  # to MXFP4
    exact_unknowns: Positive = 16384  # a layer; above, block Gauss-Seidel expert by expert


class ProbeSettings(Settings):
    """Which layer task=io_probe writes."""

    layer: NonNegative = 0


class ExportSettings(Settings):
    """Where the pruned checkpoint is written and how large its shards may be."""

    path: str | None = None  # null: <runtime.checkpoint_dir>/<model>-keep<N>-<plan digest>
    max_shard_bytes: Positive = 5_000_000_000
    pad_ragged: bool = False  # layers of unequal size get never-routed experts up to the largest
