"""How a checkpoint stores the projections of experts."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Part:
    """One of the tensors that a projection is stored in."""

    suffix: str  # after the projection's name
    dtype: str | None  # safetensors' name; None: any float
    # experts, outputs, inputs -> shape; axis 0 is sliced by expert
    shape: Callable[[int, int, int], tuple[int, ...]]
    weights: int  # that one stored number stands for; 0: it only scales others
    has_nan: Callable[[bytes], bool] | None = None  # of a chunk; None: as its dtype says


@dataclass(frozen=True)
class Grid:
    """The numbers a format can hold, where `group` neighbours along the inputs share a scale."""

    group: int
    scales: Callable[[torch.Tensor], torch.Tensor]  # [.., group] -> the scale of each, [..]
    nearest: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # [.., n], scales [.., 1]


@dataclass(frozen=True)
class Format:
    """A way to store a projection of all experts of a layer in a few tensors."""

    name: str
    parts: tuple[Part, ...]
    # [K, in, out] -> the stored tensors in the order of `parts`; numbers it can hold stay exact
    encode: Callable[[torch.Tensor], tuple[torch.Tensor, ...]]
    decode: Callable[[tuple[torch.Tensor, ...]], torch.Tensor]  # the same back, float32
    grid: Grid | None = None  # None: numbers are rounded one by one

    def names(self, projection: str) -> tuple[str, ...]:
        """What the stored tensors of a projection are called."""
        return tuple(projection + part.suffix for part in self.parts)

    def stores(self, projection: str, names: Container[str]) -> bool:
        """Whether all stored tensors of a projection are among these."""
        return all(name in names for name in self.names(projection))

    def encoded(self, projection: str, weight_KIO: torch.Tensor) -> dict[str, torch.Tensor]:
        """The stored tensors of a projection [K, in, out], by name."""
        return dict(zip(self.names(projection), self.encode(weight_KIO), strict=True))

    def decoded(self, projection: str, stored: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """[K, in, out] float32 of what `encoded` made."""
        return self.decode(tuple(stored[name] for name in self.names(projection)))


@dataclass(frozen=True)
class Storage:
    """Formats that expert projections and their biases, if they have any, are stored in."""

    weight: Format
    bias: Format | None

    def __str__(self) -> str:
        biases = f" with {self.bias.name} biases" if self.bias else ""
        return self.weight.name + biases
