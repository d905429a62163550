"""What is different from one MoE architecture to the next: gpt-oss by hand, others asked for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eaft_prune.checkpoints.families import gpt_oss
from eaft_prune.checkpoints.families.base import Family
from eaft_prune.checkpoints.read import read_json
from eaft_prune.core.text import shortened
from eaft_prune.core.types import UserError

# what config.json calls the ways to store weights that are read here; GPTQ, AWQ, bitsandbytes and
# others pack them in the order of their own kernels
_METHODS = ("compressed-tensors", "fp8", "modelopt", "mxfp4")


def check_file(path: Path) -> None:
    """Raise UserError where a config.json is that of a model that cannot be pruned."""
    family_of(read_json(path))


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a checkpoint's config.json.

    Raises UserError for a model without experts, or with weights stored in a way not known here.
    """
    how = config.get("quantization_config") or {}
    method = how.get("quant_method") if isinstance(how, dict) else how
    if how and method not in _METHODS:
        raise UserError(
            f"config.json: quantization_config.quant_method = {shortened(repr(method))}: weights "
            f"are read as plain floats or by {', '.join(_METHODS)}: prune the checkpoint that this "
            "one was made from, and quantise what comes out"
        )
    if config.get("model_type") == gpt_oss.FAMILY.model_type:
        return gpt_oss.FAMILY
    from eaft_prune.checkpoints.families import any_moe  # imports torch and transformers

    return any_moe.family(config)
