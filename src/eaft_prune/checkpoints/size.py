"""How large a checkpoint is."""

from __future__ import annotations

import math

from eaft_prune.checkpoints.formats import weights_of
from eaft_prune.checkpoints.formats.matrices import matrices, parts_of
from eaft_prune.checkpoints.read import ModelFiles


def parameters(files: ModelFiles) -> int:
    """Number of weights, those of packed tensors one by one."""
    packed = dict(part for matrix in matrices(files.tensors).values() for part in parts_of(matrix))
    return sum(
        packed.get(name, weights_of(name, entry.dtype)) * math.prod(entry.shape)
        for name, entry in files.tensors.items()
    )
