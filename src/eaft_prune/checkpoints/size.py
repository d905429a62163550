"""How large a checkpoint is."""

from __future__ import annotations

import math

from eaft_prune.checkpoints.cut import cut
from eaft_prune.checkpoints.families.base import Family
from eaft_prune.checkpoints.formats import weights_of
from eaft_prune.checkpoints.formats.matrices import matrices, parts_of
from eaft_prune.checkpoints.read import ModelFiles
from eaft_prune.checkpoints.slice import sliced_bytes
from eaft_prune.core.types import KeepPlan


def parameters(files: ModelFiles) -> int:
    """Number of weights, those of packed tensors one by one."""
    packed = dict(part for matrix in matrices(files.tensors).values() for part in parts_of(matrix))
    return sum(
        packed.get(name, weights_of(name, entry.dtype)) * math.prod(entry.shape)
        for name, entry in files.tensors.items()
    )


def bytes_of(family: Family, files: ModelFiles, keep_n: int) -> int:
    """Bytes of tensors that stay where every layer keeps `keep_n` experts, as many of each group.

    Raises UserError where the groups cannot share so many out.
    """
    n_experts, groups = family.n_experts(files.config), family.groups(files.config)
    width = n_experts // groups
    kept = tuple(i for i in range(n_experts) if i % width < keep_n // groups)
    sliced = cut(family, files, KeepPlan((kept,) * family.n_layers(files.config), n_experts))
    return sum(sliced_bytes(sliced.files.tensors[name], of) for name, of in sliced.slices.items())
