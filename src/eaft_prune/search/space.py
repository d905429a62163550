"""The searched settings: as Optuna's distributions, and put in place of the configured ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from pydantic import ValidationError

from eaft_prune.checkpoints.model import Model
from eaft_prune.config import PruningSettings, RangeSettings, SearchSettings
from eaft_prune.core.types import UserError
from eaft_prune.stages.plan import check_keep_n

Space = Mapping[str, BaseDistribution]


def settings_of(pruning: PruningSettings, chosen: Mapping[str, Any]) -> PruningSettings:
    """The pruning settings with a trial's values in place, validated again."""
    changes = {name.removeprefix("pruning."): value for name, value in chosen.items()}
    return PruningSettings.model_validate({**pruning.model_dump(), **changes})


def distributions(settings: SearchSettings, pruning: PruningSettings) -> Space:
    """Optuna's distribution of every searched setting; raises UserError where it cannot be one."""
    made = {}
    for name, space in settings.space.items():
        field = name.removeprefix("pruning.")
        whole = PruningSettings.model_fields[field].annotation is not float
        step = space.step
        if field == "keep_n" and step is None:
            step = pruning.keep_multiple
        try:
            made[name] = _distribution(space, whole, step)
        except ValueError as error:
            raise UserError(f"search.space.{name}: {error}") from error
    return made


def check_space(pruning: PruningSettings, space: Space, base: Model) -> None:
    """Raise UserError unless each setting may take the ends of its range, or every choice."""
    for name, distribution in space.items():
        ends = getattr(distribution, "choices", None)
        for value in ends or (distribution.low, distribution.high):
            try:
                tried = settings_of(pruning, {name: value})
            except ValidationError as error:
                why = error.errors()[0]["msg"]
                raise UserError(f"search.space.{name}: {value!r}: {why}") from None
            check_keep_n(tried, base.n_experts, base.top_k, base.groups, base.least)
            if tried.keep_n % tried.keep_multiple:
                raise UserError(
                    f"search.space.{name}: pruning.keep_n = {tried.keep_n} is not a multiple of "
                    f"pruning.keep_multiple = {tried.keep_multiple}"
                )


def _distribution(space: RangeSettings, whole: bool, step: float | None) -> BaseDistribution:
    def number(value: Any) -> Any:
        plain = isinstance(value, float) and value.is_integer()
        return int(value) if whole and plain else value

    if space.choices is not None:
        return CategoricalDistribution([number(value) for value in space.choices])
    assert space.low is not None, "config requires low and high together"
    assert space.high is not None, "config requires low and high together"
    if not whole:
        return FloatDistribution(space.low, space.high, log=space.log, step=step)
    low, high, by = number(space.low), number(space.high), number(step or 1)
    if not all(isinstance(value, int) for value in (low, high, by)):
        raise ValueError(f"takes whole numbers, got {space.low}, {space.high}, step {by}")
    return IntDistribution(low, high, log=space.log, step=by)
