"""MXFP4 weights that stay packed, wherever they lie, and become numbers just before they are used.

A dequantised weight lives in a buffer that all layers share: it is good until the next one is asked
for. Layers that do not fit on the device wait in host memory (or in the page cache of their file)
and are copied ahead of use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch

from eaft_prune.checkpoints.formats.e2m1 import GROUP
from eaft_prune.checkpoints.formats.e2m1 import dequantize as dequantized

Packed = tuple[torch.Tensor, torch.Tensor]  # blocks [E, R, G, 16] and scales [E, R, G]


@dataclass(frozen=True)
class Scratch:
    """Buffers for dequantised weights, one a shape."""

    device: torch.device
    dtype: torch.dtype
    _buffers: dict[tuple[int, ...], torch.Tensor] = field(default_factory=dict)

    def take(self, *shape: int) -> torch.Tensor:
        if shape not in self._buffers:
            self._buffers[shape] = torch.empty(shape, dtype=self.dtype, device=self.device)
        return self._buffers[shape]


@dataclass(frozen=True)
class PackedWeight:
    """One projection of all experts of a layer; `read` gives its bytes on the scratch's device."""

    read: Callable[[], Packed]
    scratch: Scratch

    def dense(self) -> torch.Tensor:
        """[E, in, out]; overwritten by the next call for a weight of this shape."""
        return self._dequantized(*self.read())

    def __getitem__(self, expert: int) -> torch.Tensor:
        """[in, out] of one expert; overwritten likewise."""
        blocks, scales = self.read()
        return self._dequantized(blocks[expert], scales[expert])

    def _dequantized(self, blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        *outer, groups = scales.shape
        out = self.scratch.take(*outer, groups * GROUP)
        return dequantize(blocks, scales, out).transpose(-2, -1)


def dequantize(blocks: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """[.., G, 16] and [.., G] -> [.., 32 G]; on CUDA by a kernel, with the same bits."""
    if blocks.device.type == "cuda":
        from eaft_prune.engines.kernels import mxfp4

        return mxfp4.dequantize(blocks, scales, out)
    return dequantized(blocks, scales, out)


class HostLayers:
    """Packed layers in host memory, copied into one of two device slots while others compute.

    `layers[i]` maps a weight's name to its bytes. They are asked for in ascending order, over and
    over, so the next one is always under way.
    """

    def __init__(self, layers: Sequence[Mapping[str, Packed]], device: torch.device) -> None:
        self._layers = layers
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._slots = [_like(layers[0], device, pin=False) for _ in range(2)]
        self._pinned = [_like(layers[0], torch.device("cpu"), pin=True) for _ in range(2)]
        self._copied = [torch.cuda.Event() for _ in range(2)]
        self._used = [torch.cuda.Event() for _ in range(2)]
        self._pool = ThreadPoolExecutor(1)  # reads pages and copies them without Python's lock
        self._pending: dict[int, Future[None]] = {}
        self._turn: dict[int, int] = {}  # layer -> slot
        self._current = -1
        self._start(0)

    def read(self, index: int, name: str) -> Packed:
        """The bytes of one weight of layer `index`, on the device."""
        if index != self._current:
            if index not in self._pending:  # the last forward was broken off
                self._forget()
                self._start(index)
            if self._current >= 0:
                self._used[self._turn[self._current]].record()
            self._pending.pop(index).result()
            self._copied[self._turn[index]].wait()
            self._current = index
            if len(self._layers) > 1:  # a single one stays where it is
                self._start((index + 1) % len(self._layers))
        return self._slots[self._turn[index]][name]

    def _start(self, index: int) -> None:
        slot = 1 - self._turn[self._current] if self._current >= 0 else 0
        self._turn[index] = slot

        def copy() -> None:
            self._copied[slot].synchronize()  # the pinned pages of two layers ago are read
            for name, parts in self._layers[index].items():
                for pinned, part in zip(self._pinned[slot][name], parts, strict=True):
                    pinned.copy_(part)
            with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
                self._used[slot].wait()
                for name, parts in self._slots[slot].items():
                    for target, pinned in zip(parts, self._pinned[slot][name], strict=True):
                        target.copy_(pinned, non_blocking=True)
                self._copied[slot].record()

        self._pending[index] = self._pool.submit(copy)

    def _forget(self) -> None:
        for pending in self._pending.values():
            pending.result()
        self._pending.clear()


def spread(count: int, total: int) -> list[int]:
    """`count` of range(total), evenly spaced: streamed layers lie between resident ones."""
    return [i * total // count for i in range(count)] if count else []


def _like(layer: Mapping[str, Packed], device: torch.device, pin: bool) -> dict[str, Packed]:
    def empty(part: torch.Tensor) -> torch.Tensor:
        return torch.empty(part.shape, dtype=part.dtype, device=device, pin_memory=pin)

    return {name: (empty(blocks), empty(scales)) for name, (blocks, scales) in layer.items()}
