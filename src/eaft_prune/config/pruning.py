"""Settings of what is cut and where it is written."""

from __future__ import annotations

from typing import Any, Literal

from eaft_prune.config.base import Fraction, NonNegative, Positive, Settings

Saliency = Literal["one", "gate", "norm", "gate_norm", "random"]
Regions = Literal["strict", "policy"]
_CUT = ("keep_n", "keep_multiple", "core_pos_top_m", "core_count_top_m")


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

    @property
    def scoring(self) -> dict[str, Any]:
        """The settings that scores depend on; the others say how a plan is cut from them."""
        return self.model_dump(exclude={"name", *_CUT})


class ProbeSettings(Settings):
    """Which layer task=io_probe writes."""

    layer: NonNegative = 0


class ExportSettings(Settings):
    """Where the pruned checkpoint is written and how large its shards may be."""

    path: str | None = None  # null: <runtime.checkpoint_dir>/<model>-keep<N>-<plan digest>
    max_shard_bytes: Positive = 5_000_000_000
