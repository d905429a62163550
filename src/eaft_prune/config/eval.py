"""Settings of what is evaluated."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from eaft_prune.config.base import (
    BlockCount,
    Fraction,
    Name,
    NonNegative,
    Positive,
    SeqLen,
    Settings,
)
from eaft_prune.core.types import UserError

Candidate = Literal["pruned", "masked"]
Counts = BlockCount | tuple[BlockCount, ...]


class EvalSettings(Settings):
    """Which blocks base and candidate are evaluated on, and what CC and H mean."""

    name: Name
    """label of the regime in reports"""
    seq_lens: Annotated[tuple[SeqLen, ...], Field(min_length=1)]
    """tokens a block, one evaluation each"""
    num_blocks: Counts | dict[str, Counts]
    """blocks a pack: a count or all, one a length, or packs (`default`: the rest) -> those"""
    packs: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """null: every pack, then UNION"""
    seed: NonNegative | None = None
    """which blocks are evaluated; null: file order"""
    candidates: Annotated[tuple[Candidate, ...], Field(min_length=1)] = ("pruned",)
    """pruned: the exported checkpoint; masked: the plan applied in the base model"""
    top_k: Positive | None = None
    """compute lever: experts a token of the masked candidate; null: as the base"""
    early_stop: bool = False
    """evaluate what the gate reads only until its verdict is sure (needs eval.seed)"""
    cc_quantile: Fraction = 0.15
    """of probability and entropy: what a confident conflict (CC) is"""
    entropy_top_k: Annotated[int, Field(ge=2)] = 20
    """likeliest tokens that the entropy H is taken over"""
    generation: bool = False
    """let base and candidate write on, and compare what they write (section generation)"""
    tasks: tuple[str, ...] = ()
    """tasks of lm-evaluation-harness that both are given, by name (section harness)"""
    kl_top_k: Positive | None = 64
    """likeliest tokens of the base that the KL to it is taken over; null: no divergence table"""

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
        for field in ("seq_lens", "packs", "candidates", "tasks"):
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
    def interim_shares(self) -> tuple[float, ...]:
        """Shares of the blocks at which the gate is asked; all of them without `early_stop`."""
        return (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0) if self.early_stop else (1.0,)

    def blocks_of(self, pack: str, seq_len: int) -> BlockCount:
        """Number of blocks to evaluate of one pack at one sequence length, or `all`."""
        counts = self.num_blocks
        if isinstance(counts, dict):
            if pack not in counts and "default" not in counts:
                raise UserError(f"eval.num_blocks = {counts} names neither {pack!r} nor `default`")
            counts = counts.get(pack, counts.get("default", 0))
        return counts[self.seq_lens.index(seq_len)] if isinstance(counts, tuple) else counts
