"""Settings of what goes in: model, packs, the blocks to profile on."""

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
from eaft_prune.core.types import UNION


class ModelSettings(Settings):
    """Where the base checkpoint is: a directory, `demo:`, or a hub id with a revision."""

    name: Name
    """label in reports and of exported checkpoints"""
    path: str | None = None
    """checkpoint directory"""
    hub_id: str | None = None
    """repository of the hub, in place of a path"""
    revision: str | None = None
    """commit or branch of hub_id; null: its head, the digests of what was read are recorded"""

    @model_validator(mode="after")
    def _one_source(self) -> ModelSettings:
        if self.path is None and self.hub_id is None:
            raise ValueError("model.path is missing: give model.path=DIR, or model.hub_id=NAME")
        if self.path is not None and self.hub_id is not None:
            raise ValueError("give exactly one of model.path (a directory) and model.hub_id")
        return self


class PacksSettings(Settings):
    """Named files of rows, in UNION order, how rows are read and how they are split."""

    name: Name
    """label in reports"""
    files: dict[Name, str]
    """name -> .parquet, .jsonl or .csv file: a path, `demo:` or hf://"""
    revision: str | None = None
    """of hf:// files; null: the head"""
    text_column: str = "text"
    """column of the rows: texts, or lists of messages for the chat template"""
    format: Literal["harmony", "messages", "plain"] = "harmony"
    """messages: the model's chat template writes rows, harmony text too; plain: all is scored"""
    max_malformed: Annotated[float, Field(ge=0, le=1)] = 0.01
    """share of rows that may be no well-formed harmony: they are counted, above it refused"""
    split: Literal["hash", "none"] = "hash"
    """rows to profiling or evaluation by the hash of their text; none: all rows to both"""
    profile_fraction: Fraction = 0.5
    """share of the rows for profiling, when split=hash"""

    @model_validator(mode="after")
    def _names(self) -> PacksSettings:
        if not self.files:
            raise ValueError("packs.files is missing: give 'packs.files={name: file.parquet}'")
        if UNION in self.files:
            raise ValueError(f"{UNION} is the interleave of all packs; name the file otherwise")
        return self


class ProfileSettings(Settings):
    """Which UNION blocks the base model is profiled on."""

    num_blocks: BlockCount = 64
    """UNION blocks; all: as many as the rows give"""
    seq_len: SeqLen = 2048
    """tokens a block"""
    seed: NonNegative | None = 0
    """which rows are profiled; null: file order"""
    early_stop: bool = False
    """profile in doubling steps and stop once a step leaves the keep plan as it was"""
    early_stop_first_blocks: Positive = 8
    """blocks of the first interim plan; each further one takes twice as many"""
    early_stop_agreement: Annotated[float, Field(gt=0, le=1)] = 0.98
    """Jaccard index of successive interim plans, mean over layers, that counts as unchanged"""
