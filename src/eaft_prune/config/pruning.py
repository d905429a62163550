"""Settings of what is cut and where it is written."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from eaft_prune.config.base import Fraction, NonNegative, Positive, Settings

Saliency = Literal["one", "gate", "norm", "gate_norm", "random"]
Regions = Literal["strict", "policy"]
_CUT = ("keep_n", "keep_multiple", "core_pos_top_m", "core_count_top_m")
_AFTER = ("compensation",)  # what is done to the experts that a plan keeps


class PruningSettings(Settings):
    """How experts are scored and how many stay (DESIGN section 2: Score, Regions, Keep plan)."""

    name: str
    keep_n: Positive
    saliency: Saliency
    weight: Literal["uniform", "eaft"]
    reduce: Literal["sum", "mean"]
    regions: Regions = "strict"
    quantile: Fraction = 0.15
    high_quantile: Fraction = 0.85
    w_good: float = 1.0
    w_uncertain: float = 0.25
    w_conflict: float = -2.0
    keep_multiple: Positive = 4
    core_pos_top_m: NonNegative = 4
    core_count_top_m: NonNegative = 0
    seed: NonNegative = 0  # of saliency=random
    compensation: Literal["none", "bias", "down_proj"] = "none"

    @property
    def scoring(self) -> dict[str, Any]:
        """The settings that scores depend on; the others say how a plan is cut from them."""
        return self.model_dump(exclude={"name", *_CUT, *_AFTER})


class CompensationSettings(Settings):
    """How pruning.compensation solves for its changes, and on which blocks of profiling rows."""

    num_blocks: Positive = 64  # UNION, of profile.seq_len tokens
    seed: NonNegative = 0  # which rows, and which of them choose the ridge
    ridge: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"  # auto: on held-out rows
    rounding: Literal["feedback", "nearest"] = "feedback"  # to MXFP4
    exact_unknowns: Positive = 16384  # a layer; above, block Gauss-Seidel expert by expert


class ProbeSettings(Settings):
    """Which layer task=io_probe writes."""

    layer: NonNegative = 0


class ExportSettings(Settings):
    """Where the pruned checkpoint is written and how large its shards may be."""

    path: str | None = None  # null: <runtime.checkpoint_dir>/<model>-keep<N>-<plan digest>
    max_shard_bytes: Positive = 5_000_000_000
