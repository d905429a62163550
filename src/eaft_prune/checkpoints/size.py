"""How large a checkpoint is."""

from __future__ import annotations

import math

from eaft_prune.checkpoints.formats import weights_of
from eaft_prune.checkpoints.read import ModelFiles


def parameters(files: ModelFiles) -> int:
    """Number of weights, those of packed tensors one by one."""
    return sum(
        weights_of(name, entry.dtype) * math.prod(entry.shape)
        for name, entry in files.tensors.items()
    )
