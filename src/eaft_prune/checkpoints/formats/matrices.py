"""Matrices stored in several tensors each: eight- and four-bit numbers with scales beside them.

Of a matrix X (`..._proj.weight`, or `experts.gate_up_proj` of all experts at once) the tensors are
called X and something after it, or are siblings of X. Kept experts' tensors are copied as they are;
decoding serves to run them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Shape = tuple[int, ...]
Parts = Mapping[str, "torch.Tensor"]

_FP8 = ("F8_E4M3",)


@dataclass(frozen=True)
class MatrixFormat:
    """One way to store a matrix [.., out, in].

    numbers: what the tensor of the numbers is called after X, of which dtypes it is, how many
    weights one of them holds. scales: what else is needed to decode, beside: what is not; a name
    that begins with `.` is a sibling's.
    """

    name: str
    numbers: str
    dtypes: tuple[str, ...]
    weights: int
    scales: Mapping[str, tuple[str, ...]]  # name -> dtypes
    # numbers and scales by name, rows and columns of a block -> float32
    decode: Callable[[Parts, tuple[int, int]], torch.Tensor]
    beside: tuple[str, ...] = ()


@dataclass(frozen=True)
class Matrix:
    """A matrix of a checkpoint: its name, shape, format, and the tensors that it is stored in."""

    name: str
    shape: Shape
    form: MatrixFormat
    parts: Mapping[str, str]  # numbers and scales: name within the format -> of the tensor
    beside: tuple[str, ...]

    @property
    def tensors(self) -> tuple[str, ...]:
        return (*self.parts.values(), *self.beside)


def matrices(tensors: Mapping[str, Any]) -> dict[str, Matrix]:
    """All matrices in these formats by name; the entries have `dtype` and `shape`."""
    found = {}
    for name, entry in tensors.items():
        for form in MATRICES:
            if entry.dtype not in form.dtypes or not name.endswith(form.numbers):
                continue
            stem = name.removesuffix(form.numbers) if form.numbers else name
            scales = {part: _named(stem, part) for part in form.scales}
            fits = all(
                (scale := tensors.get(full)) is not None and scale.dtype in form.scales[part]
                for part, full in scales.items()
            )
            if fits:
                shape = (*entry.shape[:-1], entry.shape[-1] * form.weights)
                beside = tuple(n for part in form.beside if (n := _named(stem, part)) in tensors)
                parts = {form.numbers: name, **scales}
                found[stem] = Matrix(stem, shape, form, parts, beside)
                break
    return found


def parts_of(matrix: Matrix) -> Iterator[tuple[str, int]]:
    """Tensors of a matrix, and how many weights one stored number of each stands for."""
    for part, name in matrix.parts.items():
        yield name, matrix.form.weights if part == matrix.form.numbers else 0
    for name in matrix.beside:
        yield name, 0


def _named(stem: str, part: str) -> str:
    """What a tensor that belongs to a matrix is called."""
    return stem.rpartition(".")[0] + part if part.startswith(".") else stem + part


def _blocks(parts: Parts, block: tuple[int, int]) -> torch.Tensor:
    """Numbers times the scale of their block of rows and columns, the last ones cut off."""
    numbers, scale = parts[""].float(), parts["_scale_inv"].float()
    rows, columns = numbers.shape[-2:]
    whole = scale.repeat_interleave(block[0], -2)[..., :rows, :]
    return numbers * whole.repeat_interleave(block[1], -1)[..., :columns]


def _scaled(parts: Parts, block: tuple[int, int]) -> torch.Tensor:
    """Numbers times the scale of all, or of their row."""
    numbers, scale = parts[""].float(), parts["_scale"].float()
    return numbers * (scale if scale.dim() == numbers.dim() else scale.reshape(-1, 1))


def _modelopt(parts: Parts, block: tuple[int, int]) -> torch.Tensor:
    """e2m1 times the scale of 16 neighbours times the scale of all."""
    return _fours(parts[""], parts["_scale"].float()) * parts["_scale_2"].float()


def _compressed(parts: Parts, block: tuple[int, int]) -> torch.Tensor:
    """The same where the scale of all is stored as its inverse."""
    return _fours(parts["_packed"], parts["_scale"].float()) / parts["_global_scale"].float()


def _e8m0(parts: Parts, block: tuple[int, int]) -> torch.Tensor:
    """e2m1 times powers of two, stored as their exponents plus 127."""
    import torch

    numbers, scale = parts.values()  # in the order of the format
    return _fours(numbers, torch.exp2(scale.view(torch.uint8).float() - 127))


def _fours(pairs: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """e2m1 pairs, low nibble first, [.., out, in / 2] times scales of equal groups [.., out, G]."""
    from eaft_prune.checkpoints.formats.e2m1 import values_of

    numbers = values_of(pairs)
    group = numbers.shape[-1] // scale.shape[-1]
    return numbers * scale.repeat_interleave(group, -1)


def _int4(parts: Parts, block: tuple[int, int]) -> torch.Tensor:
    """Eight integers of four bits in an int32, lowest first, stored with 8 added."""
    import torch

    packed, scale = parts["_packed"], parts["_scale"].float()
    shifts = torch.arange(0, 32, 4, device=packed.device, dtype=torch.int32)
    numbers = ((packed[..., None] >> shifts) & 15).flatten(-2) - 8
    columns = int(parts["_shape"].reshape(-1)[-1])
    numbers = numbers[..., :columns].float()
    group = math.ceil(columns / scale.shape[-1])
    return numbers * scale.repeat_interleave(group, -1)[..., :columns]


_FLOATS = ("F32", "BF16", "F16")

MATRICES: tuple[MatrixFormat, ...] = (
    MatrixFormat("FP8 blocks", "", _FP8, 1, {"_scale_inv": _FLOATS}, _blocks, (".input_scale",)),
    MatrixFormat(
        "NVFP4",
        "",
        ("U8",),
        2,
        {"_scale": _FP8, "_scale_2": ("F32",)},
        _modelopt,
        (".input_scale",),
    ),
    MatrixFormat("FP8", "", _FP8, 1, {"_scale": _FLOATS}, _scaled, (".input_scale",)),
    MatrixFormat(
        "NVFP4 compressed-tensors",
        "_packed",
        ("U8",),
        2,
        {"_scale": _FP8, "_global_scale": ("F32",)},
        _compressed,
        (".input_global_scale",),
    ),
    MatrixFormat("MXFP4 compressed-tensors", "_packed", ("U8",), 2, {"_scale": ("U8",)}, _e8m0),
    MatrixFormat("MXFP4", "", ("I8", "U8"), 2, {".scale": ("F8_E8M0",)}, _e8m0),
    MatrixFormat(
        "INT4 compressed-tensors",
        "_packed",
        ("I32",),
        8,
        {"_scale": _FLOATS, "_shape": ("I64", "I32")},
        _int4,
    ),
)
