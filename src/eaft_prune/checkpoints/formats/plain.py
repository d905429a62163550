"""Floats, one a weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from eaft_prune.checkpoints.formats.base import Format, Part

if TYPE_CHECKING:
    import torch


def _plain(name: str, kind: str) -> Format:
    def encode(weight_KIO: torch.Tensor) -> tuple[torch.Tensor, ...]:
        import torch

        return (weight_KIO.to(getattr(torch, kind)),)

    part = Part("", name, lambda experts, outputs, inputs: (experts, inputs, outputs), weights=1)
    return Format(name, (part,), encode, lambda stored: stored[0].float())


FLOATS: Mapping[str, Format] = {
    name: _plain(name, kind)
    for name, kind in (("BF16", "bfloat16"), ("F16", "float16"), ("F32", "float32"))
}
