"""Settings of an Optuna search."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from eaft_prune.config.base import BlockCount, NonNegative, Positive, SeqLen, Settings, allowed
from eaft_prune.config.pruning import PruningSettings

Objective = Literal["dnll", "dppl", "dcc_rate", "dmean_prob", "js2d", "keep_n"]


class RangeSettings(Settings):
    """One searched setting: a range (`step` for a grid, `log` for a log scale) or a choice."""

    low: float | None = None
    """least value"""
    high: float | None = None
    """largest value"""
    step: float | None = None
    """distance of the values; null: any between"""
    log: bool = False
    """drawn on a log scale"""
    choices: tuple[str | float | bool, ...] | None = None
    """in place of a range"""

    @model_validator(mode="after")
    def _either(self) -> RangeSettings:
        if (self.choices is None) == (self.low is None or self.high is None):
            raise ValueError("give either low and high, or choices")
        if self.low is not None and self.high is not None and self.low >= self.high:
            raise ValueError(f"low = {self.low} must be below high = {self.high}")
        return self


class SamplerSettings(Settings):
    """An Optuna sampler (or pruner) by class name, and its arguments."""

    name: str
    """class of optuna.samplers (or optuna.pruners)"""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """of that class"""


class SearchSettings(Settings):
    """Optuna over pruning settings, scored by masked evaluation on rows of the profiling part."""

    study: str | None = None
    """null: named after everything the objective depends on, so that a search goes on"""
    storage: str = "sqlite:///mlruns/optuna.db"
    """or journal:FILE, or any database URL"""
    n_trials: Positive = 50
    """finished trials in total: run again to go on where a search stopped"""
    workers: Positive = 1
    """processes on the study"""
    space: Annotated[dict[str, RangeSettings], Field(min_length=1)]
    """any pruning setting -> {low, high[, step][, log]} or {choices}"""
    objectives: Annotated[tuple[Objective, ...], Field(min_length=1)] = ("dnll",)
    """all minimised; absolute values but for dnll and keep_n"""
    seq_len: SeqLen = 1024
    """tokens a block"""
    num_blocks: BlockCount = 32
    """UNION blocks of the profiling rows, a replicate; all: as many as those give"""
    chunk_blocks: Positive = 8
    """a trial reports, and may be stopped, after each chunk"""
    seeds: Annotated[tuple[NonNegative, ...], Field(min_length=1)] = (1,)
    """which blocks; several are replicates inside a trial"""
    early_stop: bool = True
    """stop a trial once it is sure to stay behind the best"""
    early_stop_confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    """of that, one-sided"""
    sampler: SamplerSettings = SamplerSettings(name="TPESampler", arguments={"seed": 0})
    """one of Optuna's samplers by name and arguments"""
    pruner: SamplerSettings | None = None
    """one of Optuna's pruners by name and arguments, beside early_stop"""

    @model_validator(mode="after")
    def _known_settings(self) -> SearchSettings:
        known = [f"pruning.{name}" for name in PruningSettings.model_fields if name != "name"]
        for name in self.space:
            if name not in known:
                raise ValueError(f"search.space names {name!r}; {allowed(name, known)}")
        if "keep_n" in self.objectives and "pruning.keep_n" not in self.space:
            raise ValueError("objective keep_n needs pruning.keep_n in search.space")
        return self
