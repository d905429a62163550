"""Tensors of a checkpoint, each file opened once."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from eaft_prune.checkpoints.read import ModelFiles

if TYPE_CHECKING:
    import torch

ReadTensor = Callable[[str, "torch.device"], "torch.Tensor"]


def reader(files: ModelFiles) -> ReadTensor:
    """Read tensors of the checkpoint; on the CPU they are pages of the file."""
    from safetensors import safe_open

    opened: dict[tuple[str, str], Any] = {}

    def read(name: str, device: torch.device) -> torch.Tensor:
        key = files.tensors[name].file, str(device)
        if key not in opened:
            file: Any = safe_open(files.path / key[0], framework="pt", device=key[1])
            opened[key] = file.__enter__()
        tensor: torch.Tensor = opened[key].get_tensor(name)
        return tensor

    return read
