"""How a checkpoint stores the projections of experts, and the numbers it then holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from eaft_prune.engines import mxfp4
from eaft_prune.engines.packed import dequantize

FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@dataclass(frozen=True)
class Storage:
    """Types that expert projections (MXFP4, BF16 ...) and their biases are stored in."""

    weight: str
    bias: str


def encoded(name: str, weight_KIO: torch.Tensor, storage: Storage) -> dict[str, torch.Tensor]:
    """The tensors of a projection [K, in, out], by name.

    MXFP4 transposes it and groups it along `in`.
    """
    if storage.weight != "MXFP4":
        return {name: weight_KIO.to(FLOATS[storage.weight])}
    blocks, scales = mxfp4.quantize(weight_KIO.transpose(1, 2))
    return {f"{name}_blocks": blocks, f"{name}_scales": scales}


def decoded(stored: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    """[K, in, out] float32 of what `encoded` made."""
    if name in stored:
        return stored[name].float()
    blocks, scales = stored[f"{name}_blocks"], stored[f"{name}_scales"]
    shape = (*scales.shape[:-1], scales.shape[-1] * mxfp4.GROUP)
    out = torch.empty(shape, device=scales.device)
    return dequantize(blocks, scales, out).transpose(1, 2)
