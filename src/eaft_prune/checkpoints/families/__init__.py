"""One file per model_type: tensor table, config patch, router mask, expert modules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from eaft_prune.checkpoints.families import gpt_oss, mixtral, qwen3_moe
from eaft_prune.checkpoints.families.base import Family
from eaft_prune.core.text import shortened
from eaft_prune.core.types import UserError

FAMILIES: Mapping[str, Family] = {
    family.model_type: family for family in (gpt_oss.FAMILY, mixtral.FAMILY, qwen3_moe.FAMILY)
}


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a checkpoint's config.json; raises UserError for a model_type without one."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UserError(
            f"config.json: model_type = {shortened(repr(model_type))} is not supported; "
            f"allowed: {', '.join(sorted(FAMILIES))} (a family is one file in families/)"
        )
    return FAMILIES[model_type]
