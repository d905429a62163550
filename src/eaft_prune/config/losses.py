"""Settings of losses measured by masking experts."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from eaft_prune.config.base import BlockCount, NonNegative, Positive, SeqLen, Settings


class MarginalSettings(Settings):
    """Losses measured by masking, for leave_one_out, greedy and selection=marginal_loss."""

    num_blocks: BlockCount = 16
    """UNION blocks of the profiling rows; all: as many as those give"""
    seq_len: SeqLen = 1024
    """tokens a block"""
    seed: NonNegative | None = 0
    """which rows; null: file order"""
    early_stop: bool = False
    """of leave_one_out: no more blocks for an expert whose place is sure"""
    early_stop_confidence: Annotated[float, Field(ge=0.5, lt=1)] = 0.95
    """that the plan is the one of all blocks"""
    rounds: Positive | None = None
    """of greedy: experts dropped a layer; null: down to pruning.keep_n"""
    candidates: Positive = 4
    """of greedy: experts of a layer that are measured again in a round"""
