"""Matrices of a checkpoint that are stored in several tensors, seen as what they are: matrices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from eaft_prune.checkpoints.formats.matrices import Matrix
from eaft_prune.checkpoints.read import ModelFiles
from eaft_prune.checkpoints.tensors import reader
from eaft_prune.core.text import shortened
from eaft_prune.core.types import UserError

if TYPE_CHECKING:
    import torch

_BLOCK = (128, 128)  # rows and columns that share a scale, where config.json gives none
_NUMBERS = ("F8_E4M3", "F8_E5M2", "F8_E8M0", "U8", "I8", "I32", "U32")  # that mean nothing alone


def shapes_of(files: ModelFiles, packed: Mapping[str, Matrix]) -> dict[str, tuple[int, ...]]:
    """Shapes of all matrices and plain tensors by name, in the order they are stored.

    Raises UserError for packed numbers that belong to no matrix of a known format.
    """
    part_of = {name: matrix.name for matrix in packed.values() for name in matrix.tensors}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, entry in files.tensors.items():
        owner = part_of.get(name)
        if owner is not None:
            shapes[owner] = packed[owner].shape
        elif entry.dtype in _NUMBERS:
            how = (files.config.get("quantization_config") or {}).get("quant_method")
            raise UserError(
                f"{files.path}: tensor {name} is {entry.dtype} in a way that is not known here "
                f"(quantization_config.quant_method = {shortened(repr(how))}): convert the "
                "checkpoint to bfloat16, or to FP8 with block scales, MXFP4, NVFP4 or "
                "compressed-tensors' packed integers"
            )
        else:
            shapes[name] = entry.shape
    return shapes


def decoded(files: ModelFiles, packed: Mapping[str, Matrix]) -> dict[str, Any]:
    """What transformers loads: every tensor by name, read and decoded when it is asked for."""
    import torch

    part_of = {name for matrix in packed.values() for name in matrix.tensors}
    block, of_file, cpu = _block(files), reader(files), torch.device("cpu")

    def matrix_of(matrix: Matrix) -> torch.Tensor:
        parts = {part: of_file(name, cpu) for part, name in matrix.parts.items()}
        return matrix.form.decode(parts, block)

    whole = {
        name: _Lazy(partial(of_file, name, cpu)) for name in files.tensors if name not in part_of
    }
    return {**whole, **{name: _Lazy(partial(matrix_of, matrix)) for name, matrix in packed.items()}}


@dataclass(frozen=True)
class _Lazy:
    """A tensor that is made when it is sliced, as safetensors' slices are to transformers."""

    make: Callable[[], torch.Tensor]

    def __getitem__(self, everything: Any) -> torch.Tensor:
        return self.make()


def _block(files: ModelFiles) -> tuple[int, int]:
    size = (files.config.get("quantization_config") or {}).get("weight_block_size") or _BLOCK
    rows, columns = size
    return int(rows), int(columns)
