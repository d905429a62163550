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


def encoded(weight_KIO: torch.Tensor, dtype: str) -> dict[str, torch.Tensor]:
    """A projection [K, in, out] by the endings of its tensors' names.

    MXFP4 transposes it and groups it along `in`.
    """
    if dtype != "MXFP4":
        return {"": weight_KIO.to(FLOATS[dtype])}
    blocks, scales = mxfp4.quantize(weight_KIO.transpose(1, 2))
    return {"_blocks": blocks, "_scales": scales}


def decoded(stored: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """[K, in, out] float32 of what `encoded` made."""
    if "" in stored:
        return stored[""].float()
    blocks, scales = stored["_blocks"], stored["_scales"]
    shape = (*scales.shape[:-1], scales.shape[-1] * mxfp4.GROUP)
    out = torch.empty(shape, device=scales.device)
    return dequantize(blocks, scales, out).transpose(1, 2)
