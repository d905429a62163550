"""Settings of what is measured and what passes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from eaft_prune.config.base import Fraction, Limit, NonNegative, Positive, SeqLen, Settings
from eaft_prune.core.types import UNION, UserError
from eaft_prune.maths.metrics import Metric, metric_at, with_metrics

Candidate = Literal["pruned", "masked"]
BlockCount = Positive | tuple[Positive, ...]


class EvalSettings(Settings):
    """Which blocks base and candidate are evaluated on, and what CC and H mean."""

    name: str
    seq_lens: Annotated[tuple[SeqLen, ...], Field(min_length=1)]
    num_blocks: BlockCount | dict[str, BlockCount]  # per pack; key `default` for the rest
    packs: Annotated[tuple[str, ...], Field(min_length=1)] | None = None  # null: all and UNION
    seed: NonNegative | None
    candidates: Annotated[tuple[Candidate, ...], Field(min_length=1)] = ("pruned",)
    top_k: Positive | None = None  # experts a token of the masked candidate; null: as the base
    stop: Literal["decided"] | None = None  # evaluate what the gate reads only until it is sure
    cc_quantile: Fraction = 0.15
    entropy_top_k: Annotated[int, Field(ge=2)] = 20
    top_logprobs: bool = False  # keep the likeliest tokens: KL to the base and top-1 agreement

    @model_validator(mode="after")
    def _aligned(self) -> EvalSettings:
        counts = self.num_blocks
        named = counts if isinstance(counts, dict) else {"default": counts}
        for pack, count in named.items():
            if isinstance(count, tuple) and len(count) != len(self.seq_lens):
                raise ValueError(
                    f"num_blocks of {pack} lists {len(count)} counts for "
                    f"{len(self.seq_lens)} seq_lens {list(self.seq_lens)}"
                )
        for field in ("seq_lens", "packs", "candidates"):
            values = getattr(self, field)
            if values is not None and len(set(values)) != len(values):
                raise ValueError(f"{field} lists a value twice: {list(values)}")
        if self.top_k is not None and self.candidates != ("masked",):
            raise ValueError(
                f"eval.top_k = {self.top_k} needs eval.candidates=[masked], not "
                f"{list(self.candidates)}: a checkpoint is written with the base's top-k"
            )
        return self

    @property
    def looks(self) -> tuple[float, ...]:
        """Shares of the blocks at which the gate is asked; all of them, unless `stop` is set."""
        return (1.0,) if self.stop is None else (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)

    def blocks_of(self, pack: str, seq_len: int) -> int:
        """Number of blocks to evaluate of one pack at one sequence length."""
        counts = self.num_blocks
        if isinstance(counts, dict):
            if pack not in counts and "default" not in counts:
                raise UserError(f"eval.num_blocks = {counts} names neither {pack!r} nor `default`")
            counts = counts.get(pack, counts.get("default", 0))
        return counts if isinstance(counts, int) else counts[self.seq_lens.index(seq_len)]


def _known(metrics: dict[str, float]) -> dict[str, float]:
    """Raises UserError where a key is no metric, or one that has a key of its own."""
    for place in metrics:
        if key := metric_at(place).limit:
            raise UserError(f"gate.metrics names {place!r}, whose limit is called {key}")
    return metrics


# limits of metrics that have no key of their own, by name or as module:name
Limits = Annotated[
    dict[str, Limit], AfterValidator(_known), Field(exclude_if=lambda found: not found)
]


class PackLimits(Settings):
    """What one more pack must hold; null is not checked."""

    max_dppl: Limit | None = None
    max_dppl_relative: Limit | None = None
    max_dcc_rate: Limit | None = None
    max_dmean_prob: Limit | None = None
    max_js2d: Limit | None = None
    metrics: Limits = Field(default_factory=dict)

    @model_validator(mode="after")
    def _not_empty(self) -> PackLimits:
        if all(limit is None for limit in self.model_dump().values()):
            raise ValueError("a pack of gate.packs needs at least one limit")
        return self

    def of(self, metric: Metric) -> tuple[float | None, float | None]:
        """What a metric's change may be, and what it may be as a share of the base's number."""
        keyed: dict[Any, Any] = self.model_dump()
        own = {metric_at(place).name: limit for place, limit in self.metrics.items()}
        return keyed.get(metric.limit, own.get(metric.name)), keyed.get(metric.relative_limit)


class GateSettings(Settings):
    """The inequalities that decide near-lossless, and how sure of them a verdict must be."""

    name: str
    pack: str = UNION
    seq_lens: Annotated[tuple[SeqLen, ...], Field(min_length=1)]
    max_dppl: Limit
    max_dppl_relative: Limit
    max_dcc_rate: Limit
    max_dmean_prob: Limit
    max_js2d: Limit
    metrics: Limits = Field(default_factory=dict)
    packs: dict[str, PackLimits] = Field(
        default_factory=dict
    )  # further packs; key `default`: all others
    confidence: Annotated[float, Field(ge=0.5, lt=1)] | None = 0.95  # null: point estimates alone
    resamples: Annotated[int, Field(ge=100)] = 1000
    bootstrap_seed: NonNegative = 0
    on_fail: Literal["report", "error"] = "report"

    @model_validator(mode="after")
    def _names_differ(self) -> GateSettings:
        _ = self.measured  # raises
        return self

    @property
    def measured(self) -> tuple[Metric, ...]:
        """Every metric, those of the user's that a limit names included."""
        packs = (place for limits in self.packs.values() for place in limits.metrics)
        return with_metrics([*self.metrics, *packs])

    def over(self, looks: int) -> GateSettings:
        """The same with the chance of error shared out over several looks (Bonferroni)."""
        if looks == 1 or self.confidence is None:
            return self
        return self.model_copy(update={"confidence": 1 - (1 - self.confidence) / looks})

    def limits(self, evaluated: Iterable[str]) -> dict[str, PackLimits]:
        """The limits of every pack this gate reads, among those evaluated."""
        mine = self.model_dump(include=set(PackLimits.model_fields))
        found = {self.pack: PackLimits(**mine)}
        found |= {pack: limits for pack, limits in self.packs.items() if pack != "default"}
        if "default" in self.packs:
            found = {pack: self.packs["default"] for pack in evaluated} | found
            found = {self.pack: found.pop(self.pack), **found}
        return found


class CompareSettings(Settings):
    """Two saved evaluations for task=compare."""

    base: str
    candidate: str
