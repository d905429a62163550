"""MXFP4 (OCP Microscaling 1.0): 32 weights along the inputs are e2m1 and share an e8m0 scale."""

from __future__ import annotations

from typing import TYPE_CHECKING

from eaft_prune.checkpoints.formats.base import Format, Grid, Part

if TYPE_CHECKING:
    import torch

_GROUP = 32


def _encode(weight_KIO: torch.Tensor) -> tuple[torch.Tensor, ...]:
    from eaft_prune.checkpoints.formats.e2m1 import quantize

    return quantize(weight_KIO.transpose(1, 2))


def _decode(stored: tuple[torch.Tensor, ...]) -> torch.Tensor:
    import torch

    from eaft_prune.checkpoints.formats.e2m1 import dequantize

    blocks, scales = stored
    shape = (*scales.shape[:-1], scales.shape[-1] * _GROUP)
    return dequantize(blocks, scales, torch.empty(shape, device=scales.device)).transpose(1, 2)


def _scales(grouped: torch.Tensor) -> torch.Tensor:
    from eaft_prune.checkpoints.formats.e2m1 import exponents

    return exponents(grouped)


def _nearest(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    from eaft_prune.checkpoints.formats.e2m1 import nearest

    return nearest(values, scales)


BLOCKS = Part(
    "_blocks",
    "U8",
    lambda experts, outputs, inputs: (experts, outputs, inputs // _GROUP, _GROUP // 2),
    weights=2,
)
SCALES = Part(
    "_scales",
    "U8",
    lambda experts, outputs, inputs: (experts, outputs, inputs // _GROUP),
    weights=0,
    has_nan=lambda chunk: 255 in chunk,  # e8m0's only NaN
)
MXFP4 = Format("MXFP4", (BLOCKS, SCALES), _encode, _decode, Grid(_GROUP, _scales, _nearest))
