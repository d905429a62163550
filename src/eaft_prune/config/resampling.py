"""Settings of tasks that ask how sure a result is."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from eaft_prune.config.base import Fraction, NonNegative, Positive, Settings

Confidence = Annotated[float, Field(gt=0.5, lt=1)]


class AblateSettings(Settings):
    """Intervals of task=ablate: base and variant paired over conversations."""

    confidence: Confidence = 0.95
    """two-sided"""


class StabilitySettings(Settings):
    """What task=stability varies: profile seeds, the share of rows, resamples of rows."""

    seeds: Annotated[tuple[NonNegative, ...], Field(min_length=1)] = (1, 2)
    """a profile each, against that of profile.seed"""
    row_shares: tuple[Fraction, ...] = (0.125, 0.25, 0.5)
    """the first rows of the profile, against all"""
    resamples: Positive = 200
    """of the profiled rows, with replacement"""
    confidence: Confidence = 0.95
    """an expert kept in 5% to 95% of the resamples is in the tie zone"""
    seed: NonNegative = 0
    """of the resamples"""
