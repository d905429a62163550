"""Settings of what passes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from eaft_prune.config.base import Limit, Name, SeqLen, Settings
from eaft_prune.core.types import UNION, UserError
from eaft_prune.maths.metrics import Metric, metric_at, with_metrics


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
    """as gate.max_dppl"""
    max_dppl_relative: Limit | None = None
    """as gate.max_dppl_relative"""
    max_dcc_rate: Limit | None = None
    """as gate.max_dcc_rate"""
    max_dmean_prob: Limit | None = None
    """as gate.max_dmean_prob"""
    max_js2d: Limit | None = None
    """as gate.max_js2d"""
    metrics: Limits = Field(default_factory=dict)
    """as gate.metrics"""

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


_WRITTEN = ("dloop_rate", "dended_rate", "dwell_formed_rate", "dtask_accuracy")


class GateSettings(Settings):
    """The inequalities that decide near-lossless, and how sure of them a verdict must be."""

    name: Name
    """label of the gate in reports"""
    pack: str = UNION
    """what must hold the limits"""
    seq_lens: Annotated[tuple[SeqLen, ...], Field(min_length=1)]
    """lengths at which all limits must hold"""
    max_dppl: Limit
    """of |dPPL|"""
    max_dppl_relative: Limit
    """of |dPPL| / PPL of the base"""
    max_dcc_rate: Limit
    """of |d CC rate|"""
    max_dmean_prob: Limit
    """of |d mean p|"""
    max_js2d: Limit
    """of JS2D"""
    metrics: Limits = Field(default_factory=dict)
    """limits of further metrics: one of ours by name, your own as module:name"""
    max_dloop_rate: Limit | None = Field(None, exclude_if=lambda found: found is None)
    """of the change of the share of generations that loop (eval.generation)"""
    max_dended_rate: Limit | None = Field(None, exclude_if=lambda found: found is None)
    """of the change of the share that end by themselves"""
    max_dwell_formed_rate: Limit | None = Field(None, exclude_if=lambda found: found is None)
    """of the change of the share that is well-formed"""
    max_dtask_accuracy: Limit | None = Field(None, exclude_if=lambda found: found is None)
    """of the change of the share of right answers, where rows carry one"""
    max_dtask_recovery: Limit | None = Field(None, exclude_if=lambda found: found is None)
    """of the relative change of the score of each of eval.tasks"""
    packs: dict[str, PackLimits] = Field(default_factory=dict)
    """further packs, each with the limits it must hold; `default`: all others evaluated"""
    confidence: Annotated[float, Field(ge=0.5, lt=1)] | None = 0.95
    """of PASS, and of FAIL; null: the plain verdict by point estimates alone"""
    rarest: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """share of conversations whose losses must not go unseen: PASS takes 299 at 0.01 and 95%"""
    on_fail: Literal["report", "error"] = "report"
    """error: exit code 3 unless the gate passes"""

    @model_validator(mode="after")
    def _names_differ(self) -> GateSettings:
        _ = self.measured  # raises
        return self

    @property
    def measured(self) -> tuple[Metric, ...]:
        """Every metric, those of the user's that a limit names included."""
        packs = (place for limits in self.packs.values() for place in limits.metrics)
        return with_metrics([*self.metrics, *packs])

    @property
    def of_generated(self) -> dict[str, float]:
        """Limits of what is generated, by the name of the change."""
        found = {name: getattr(self, f"max_{name}") for name in _WRITTEN}
        return {name: limit for name, limit in found.items() if limit is not None}

    @property
    def of_tokens(self) -> GateSettings:
        """The same without limits of what a model writes or answers: tokens do not tell."""
        unmeasured = {f"max_{name}": None for name in (*_WRITTEN, "dtask_recovery")}
        return self.model_copy(update=unmeasured)

    def over(self, analyses: int) -> GateSettings:
        """The same with the chance of error shared out over interim analyses (Bonferroni)."""
        if analyses == 1 or self.confidence is None:
            return self
        return self.model_copy(update={"confidence": 1 - (1 - self.confidence) / analyses})

    def limits(self, evaluated: Iterable[str]) -> dict[str, PackLimits]:
        """The limits of every pack this gate reads, among those evaluated."""
        mine = self.model_dump(include=set(PackLimits.model_fields))
        found = {self.pack: PackLimits(**mine)}
        found |= {pack: limits for pack, limits in self.packs.items() if pack != "default"}
        if "default" in self.packs:
            found = {pack: self.packs["default"] for pack in evaluated} | found
            found = {self.pack: found.pop(self.pack), **found}
        return found
