"""Settings of losses measured by masking experts."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from eaft_prune.config.base import NonNegative, Positive, SeqLen, Settings


class MarginalSettings(Settings):
    """On which UNION blocks of the profiling rows removals are measured, and how many of them."""

    num_blocks: Positive = 16
    seq_len: SeqLen = 1024
    seed: NonNegative | None = 0
    stop_confidence: Annotated[float, Field(ge=0.5, lt=1)] | None = None  # null: all on all blocks
    rounds: Positive | None = None  # of greedy: experts dropped a layer; null: down to keep_n
    candidates: Positive = 4  # of greedy: experts of a layer measured again in a round
