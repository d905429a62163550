"""What is different from one MoE architecture to the next: gpt-oss by hand, others asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from eaft_prune.checkpoints.families import gpt_oss
from eaft_prune.checkpoints.families.base import Family


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a checkpoint's config.json; raises UserError for a model without experts."""
    if config.get("model_type") == gpt_oss.FAMILY.model_type:
        return gpt_oss.FAMILY
    from eaft_prune.checkpoints.families import any_moe  # imports torch and transformers

    return any_moe.family(config)
