"""MXFP4 bytes to bfloat16, at memory speed."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCKS = 512  # a program


@triton.jit
def _magnitude(code):
    # e2m1 without sign: 0, 0.5, 1, 1.5, 2, 3, 4, 6
    exponent = code >> 1
    mantissa = (code & 1).to(tl.float32)
    power = (1 << exponent).to(tl.float32) * 0.5
    return tl.where(exponent == 0, mantissa * 0.5, power * (1.0 + 0.5 * mantissa))


@triton.jit
def _value(code, scale):
    size = _magnitude(code & 7) * scale
    return tl.where(code >= 8, -size, size)


@triton.jit
def _dequantize_kernel(blocks, scales, out, count, BLOCK: tl.constexpr):
    block = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = block < count
    biased = tl.load(scales + block, mask=inside, other=127).to(tl.int32)
    # 2 ** (biased - 127) by its bits; 2 ** -127 is subnormal
    bits = tl.where(biased == 0, 0x00400000, biased << 23)
    scale = bits.to(tl.float32, bitcast=True)[:, None]
    byte = tl.arange(0, 16)
    mask = tl.broadcast_to(inside[:, None], (BLOCK, 16))
    packed = tl.load(blocks + block[:, None] * 16 + byte[None, :], mask=mask, other=0).to(tl.int32)
    value = tl.interleave(_value(packed & 15, scale), _value(packed >> 4, scale))
    target = out + block[:, None] * 32 + tl.arange(0, 32)[None, :]
    kept = tl.broadcast_to(inside[:, None], (BLOCK, 32))
    tl.store(target, value.to(out.dtype.element_ty), mask=kept)


def dequantize(blocks: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """e2m1 pairs (low nibble first) times 2^(scale - 127): [.., G, 16], [.., G] -> [.., 32 G]."""
    for tensor in (blocks, scales, out):
        assert tensor.is_contiguous(), "MXFP4 bytes are read as they lie in memory"
    count = scales.numel()
    _dequantize_kernel[(triton.cdiv(count, _BLOCKS),)](blocks, scales, out, count, BLOCK=_BLOCKS)
    return out
