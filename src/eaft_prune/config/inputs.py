"""Settings of what goes in: model, packs, the blocks to profile on."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from eaft_prune.config.base import Fraction, NonNegative, Positive, SeqLen, Settings
from eaft_prune.core.types import UNION


class ModelSettings(Settings):
    """Where the base checkpoint is: a directory, `demo:`, or a hub id with a revision."""

    name: str
    path: str | None = None
    hub_id: str | None = None
    revision: str | None = None

    @model_validator(mode="after")
    def _one_source(self) -> ModelSettings:
        if (self.path is None) == (self.hub_id is None):
            raise ValueError("give exactly one of path (a directory) and hub_id")
        return self


class PacksSettings(Settings):
    """Named parquet files of rows, in UNION order, how rows are read and how they are split."""

    name: str
    files: dict[str, str]
    revision: str | None = None  # of hub files
    text_column: str = "text"
    # harmony: assistant messages are scored; plain: whole rows, for tokenizers without harmony
    format: Literal["harmony", "plain"] = "harmony"
    split: Literal["hash", "none"] = "hash"
    profile_fraction: Fraction = 0.5  # of rows, when split=hash

    @model_validator(mode="after")
    def _names(self) -> PacksSettings:
        if not self.files:
            raise ValueError("packs.files is missing: give 'packs.files={name: file.parquet}'")
        if UNION in self.files:
            raise ValueError(f"{UNION} is the interleave of all packs; name the file otherwise")
        return self


class ProfileSettings(Settings):
    """Which UNION blocks the base model is profiled on."""

    num_blocks: Positive
    seq_len: SeqLen
    seed: NonNegative | None
    stop: Literal["never", "converged"] = "never"  # converged: not all blocks if fewer will do
    stop_first_blocks: Positive = 8  # the first look at the plan; each further one doubles
    stop_jaccard: Annotated[float, Field(gt=0, le=1)] = 0.98  # of two looks, mean over layers
