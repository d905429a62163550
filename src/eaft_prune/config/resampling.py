"""Settings of tasks that ask how sure a result is."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from eaft_prune.config.base import Fraction, NonNegative, Positive, Settings

Confidence = Annotated[float, Field(gt=0.5, lt=1)]


class AblateSettings(Settings):
    """Intervals of task=ablate: a paired bootstrap over evaluation blocks."""

    resamples: Positive
    confidence: Confidence
    seed: NonNegative


class StabilitySettings(Settings):
    """What task=stability varies: profile seeds, the share of rows, resamples of rows."""

    seeds: Annotated[tuple[NonNegative, ...], Field(min_length=1)]
    row_shares: tuple[Fraction, ...]
    resamples: Positive
    confidence: Confidence
    seed: NonNegative  # of the resamples
