"""A format: one byte a weight and a float32 scale a row, as INT8 checkpoints have."""

import numpy as np
import torch

from eaft_prune.checkpoints.formats.base import Format, Part


def encode(weight_KIO: torch.Tensor) -> tuple[torch.Tensor, ...]:
    rows = weight_KIO.transpose(1, 2)
    scale = rows.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
    return (rows / scale).round().to(torch.int8), scale.float()


def decode(stored: tuple[torch.Tensor, ...]) -> torch.Tensor:
    values, scale = stored
    return (values.float() * scale).transpose(1, 2)


VALUES = Part("_q", "I8", lambda experts, outputs, inputs: (experts, outputs, inputs), weights=1)
SCALES = Part(
    "_q_scale",
    "F32",
    lambda experts, outputs, inputs: (experts, outputs, 1),
    weights=0,
    has_nan=lambda chunk: bool(np.isnan(np.frombuffer(chunk, "<f4")).any()),
)
INT8 = Format("INT8", (VALUES, SCALES), encode, decode)
