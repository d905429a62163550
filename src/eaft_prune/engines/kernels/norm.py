"""Residual sum and RMS norm in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _add_norm_kernel(x, delta, weight, out, hidden, eps, ADD: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < hidden
    value = tl.load(x + row * hidden + columns, mask=inside, other=0.0)
    if ADD:
        change = tl.load(delta + row * hidden + columns, mask=inside, other=0.0)
        value = (value.to(tl.float32) + change.to(tl.float32)).to(x.dtype.element_ty)
        tl.store(x + row * hidden + columns, value, mask=inside)
    wide = value.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide) / hidden + eps)
    w = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * hidden + columns, (w * wide * scale).to(out.dtype.element_ty), mask=inside)


def add_norm_(
    x_NH: torch.Tensor, delta_NH: torch.Tensor | None, weight_H: torch.Tensor, eps: float
) -> torch.Tensor:
    """x += delta in place; returns weight * x / sqrt(mean x^2 + eps), reduced in float32."""
    n, hidden = x_NH.shape
    out = torch.empty_like(x_NH)
    block = triton.next_power_of_2(hidden)
    _add_norm_kernel[(n,)](
        x_NH, x_NH if delta_NH is None else delta_NH, weight_H, out, hidden, eps,
        ADD=delta_NH is not None, BLOCK=block, num_warps=8 if block >= 2048 else 4,
    )  # fmt: skip
    return out
