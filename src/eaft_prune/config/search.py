"""Settings of an Optuna search."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from eaft_prune.config.base import NonNegative, Positive, SeqLen, Settings, allowed
from eaft_prune.config.pruning import PruningSettings

Objective = Literal["dnll", "dppl", "dcc_rate", "dmean_prob", "js2d", "keep_n"]


class RangeSettings(Settings):
    """One searched setting: a range (`step` for a grid, `log` for a log scale) or a choice."""

    low: float | None = None
    high: float | None = None
    step: float | None = None
    log: bool = False
    choices: tuple[str | float | bool, ...] | None = None

    @model_validator(mode="after")
    def _either(self) -> RangeSettings:
        if (self.choices is None) == (self.low is None or self.high is None):
            raise ValueError("give either low and high, or choices")
        if self.low is not None and self.high is not None and self.low >= self.high:
            raise ValueError(f"low = {self.low} must be below high = {self.high}")
        return self


class SamplerSettings(Settings):
    """An Optuna sampler (or pruner) by class name, and its arguments."""

    name: str = "TPESampler"
    arguments: dict[str, Any] = Field(default_factory=dict)


class SearchSettings(Settings):
    """Optuna over pruning settings, scored by masked evaluation on rows of the profiling part."""

    study: str | None = None  # null: a digest of everything the objective depends on
    storage: str
    n_trials: Positive  # finished trials wanted in total: a search that was stopped goes on
    workers: Positive = 1
    space: Annotated[dict[str, RangeSettings], Field(min_length=1)]
    objectives: Annotated[tuple[Objective, ...], Field(min_length=1)] = ("dnll",)
    seq_len: SeqLen
    num_blocks: Positive
    chunk_blocks: Positive  # a trial reports, and may be stopped, after each chunk
    seeds: Annotated[tuple[NonNegative, ...], Field(min_length=1)] = (0,)  # replicates in a trial
    stop_confidence: Annotated[float, Field(gt=0.5, lt=1)] | None = 0.95  # null: never stop early
    sampler: SamplerSettings = SamplerSettings()
    pruner: SamplerSettings | None = None  # one of Optuna's, beside stop_confidence

    @model_validator(mode="after")
    def _known_settings(self) -> SearchSettings:
        known = [f"pruning.{name}" for name in PruningSettings.model_fields if name != "name"]
        for name in self.space:
            if name not in known:
                raise ValueError(f"search.space names {name!r}; {allowed(name, known)}")
        if "keep_n" in self.objectives and "pruning.keep_n" not in self.space:
            raise ValueError("objective keep_n needs pruning.keep_n in search.space")
        return self
