"""What blocks must be for the model that reads them: looked at before it is loaded."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from eaft_prune.checkpoints.model import Model
from eaft_prune.checkpoints.positions import max_positions
from eaft_prune.config import PacksSettings
from eaft_prune.core.store import Stored
from eaft_prune.core.types import Blocks, UserError
from eaft_prune.stages.pack import BlockRequest

log = logging.getLogger(__name__)


def check_length(base: Model, request: BlockRequest) -> None:
    """Raise UserError where blocks are longer than the model has positions."""
    most = max_positions(base.language)
    if most is not None and request.seq_len > most:
        raise UserError(
            f"pack {request.pack}: blocks of {request.seq_len:,} tokens are longer than the "
            f"{most:,} positions (max_position_embeddings, scaling included) of {base.files.path}: "
            f"lower {request.length}"
        )


def check_ids(base: Model, request: BlockRequest, blocks: Stored[Blocks]) -> None:
    """Raise UserError where the model has no embedding for a token."""
    size, largest = base.language["vocab_size"], int(blocks.value.ids_BS.max())
    if largest >= size:
        raise UserError(
            f"pack {request.pack}: the tokenizer of {base.files.path} gives token {largest}, and "
            f"vocab_size = {size} in its config.json: they are of different models; put the "
            "model's own tokenizer files there"
        )


def check_rows(packs: PacksSettings, request: BlockRequest, blocks: Stored[Blocks]) -> None:
    """Say how many rows are not well-formed; UserError above the share packs.max_malformed."""
    said = malformed_rows(blocks.record.facts)
    if said is None:
        return
    facts = blocks.record.facts
    what = f"pack {request.pack}: {said}, the first in {facts['first_malformed']}"
    if facts["malformed_rows"] > packs.max_malformed * facts["rows"]:
        raise UserError(
            f"{what}: what such rows score is a guess; mend them, or allow their share with "
            f"packs.max_malformed (now {packs.max_malformed:g})"
        )
    log.warning("%s", what)


def malformed_rows(facts: Mapping[str, Any]) -> str | None:
    """`3 of 60 rows (5.0%) are not well-formed harmony`, of a pack stage's facts; None if none."""
    count, rows = facts["malformed_rows"], facts["rows"]
    if not count:
        return None
    return f"{count:,} of {rows:,} rows ({count / rows:.1%}) are not well-formed harmony"
