"""Settings of task=frontier: how far a model can be pruned and still pass."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from eaft_prune.config.base import BlockCount, NonNegative, Positive, SeqLen, Settings

Rung = Literal["ranking", "greedy", "repaired"]


class FrontierSettings(Settings):
    """Which sizes and methods are tried, on which profiling rows, and what is proven beside."""

    ladder: Annotated[tuple[Rung, ...], Field(min_length=1)] = ("ranking", "greedy", "repaired")
    """methods in turn, each asked only for sizes at which all before it fail"""
    min_keep_n: Positive | None = None
    """fewest experts a layer that are tried; null: half of them"""
    target_gb: Annotated[float, Field(gt=0)] | None = None
    """one size alone: the most experts whose checkpoint has at most as many 10^9 bytes"""
    greedy_blocks: BlockCount = 4
    """marginal.num_blocks of the method `greedy`, whose passes are as many as all experts"""
    repair: Literal["bias", "down_proj", "experts"] = "experts"
    """pruning.compensation of the method `repaired`"""
    seq_len: SeqLen | None = None
    """tokens a block of the search; null: the gate's first length"""
    num_blocks: BlockCount = 120
    """blocks of the gate's pack, of the profiling rows; all: as many as those give"""
    seed: NonNegative = 1
    """which of those rows, and the order in which early looks take them"""
    curve: NonNegative = 1
    """sizes on either side of the answer that are measured too, but for repaired ones"""
    proofs: Positive = 2
    """sizes that may be taken to the unseen rows; gate.confidence is shared out over them"""
    rivals: tuple[str, ...] = ()
    """checkpoints (pruned elsewhere, merged, quantised) proven in the same table"""

    @model_validator(mode="after")
    def _in_order(self) -> FrontierSettings:
        order = ("ranking", "greedy", "repaired")
        if list(self.ladder) != [rung for rung in order if rung in self.ladder]:
            raise ValueError(f"ladder = {list(self.ladder)}: each once, in the order {list(order)}")
        if self.ladder == ("repaired",):
            raise ValueError("ladder = ['repaired'] has no plans to repair: put ranking before it")
        if self.target_gb is not None and self.min_keep_n is not None:
            raise ValueError("give frontier.target_gb (one size) or frontier.min_keep_n, not both")
        return self
