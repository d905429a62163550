"""Settings of what is measured and what passes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from eaft_prune.config.base import Fraction, Limit, NonNegative, Positive, SeqLen, Settings
from eaft_prune.types import UNION, UserError

Candidate = Literal["pruned", "masked"]
BlockCount = Positive | tuple[Positive, ...]


class EvalSettings(Settings):
    """Which blocks base and candidate are evaluated on, and what CC and H mean."""

    name: str
    seq_lens: Annotated[tuple[SeqLen, ...], Field(min_length=1)]
    num_blocks: BlockCount | dict[str, BlockCount]  # per pack; key `default` for the rest
    packs: Annotated[tuple[str, ...], Field(min_length=1)] | None = None  # null: all and UNION
    seed: NonNegative | None
    candidates: Annotated[tuple[Candidate, ...], Field(min_length=1)] = ("pruned",)
    top_k: Positive | None = None  # experts a token of the masked candidate; null: as the base
    cc_quantile: Fraction = 0.15
    entropy_top_k: Annotated[int, Field(ge=2)] = 20

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
        for field in ("seq_lens", "packs", "candidates"):
            values = getattr(self, field)
            if values is not None and len(set(values)) != len(values):
                raise ValueError(f"{field} lists a value twice: {list(values)}")
        if self.top_k is not None and self.candidates != ("masked",):
            raise ValueError(
                f"eval.top_k = {self.top_k} needs eval.candidates=[masked], not "
                f"{list(self.candidates)}: a checkpoint is written with the base's top-k"
            )
        return self

    def blocks_of(self, pack: str, seq_len: int) -> int:
        """Number of blocks to evaluate of one pack at one sequence length."""
        counts = self.num_blocks
        if isinstance(counts, dict):
            if pack not in counts and "default" not in counts:
                raise UserError(f"eval.num_blocks = {counts} names neither {pack!r} nor `default`")
            counts = counts.get(pack, counts.get("default", 0))
        return counts if isinstance(counts, int) else counts[self.seq_lens.index(seq_len)]


class GateSettings(Settings):
    """The inequalities that decide near-lossless."""

    name: str
    pack: str = UNION
    seq_lens: Annotated[tuple[SeqLen, ...], Field(min_length=1)]
    max_dppl: Limit
    max_dppl_relative: Limit
    max_dcc_rate: Limit
    max_dmean_prob: Limit
    max_js2d: Limit
    on_fail: Literal["report", "error"] = "report"


class CompareSettings(Settings):
    """Two saved evaluations for task=compare."""

    base: str
    candidate: str
