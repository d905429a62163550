"""Numbers to blocks and scales of MXFP4 and back, on whatever device they lie."""

from __future__ import annotations

import torch

GROUP = 32  # values that share one scale
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # by code, without the sign
_TOP = 6.0
_BIAS = 127  # of e8m0, and of float32
_LARGEST = 126  # exponent whose power of two and its inverse are normal float32 numbers
_CANDIDATES = (0, 1, -1)  # exponents above the one that puts the largest value in [4, 8)


def quantize(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[.., 32 G] -> blocks uint8 [.., G, 16] (low nibble first) and scales uint8 [.., G] (e8m0).

    The scale of a group is that of three neighbouring powers of two whose squared error is least,
    the OCP one (largest value in [4, 8) before clipping to 6) where they tie. Values that such
    blocks can hold are held exactly, with the sign of a zero.
    """
    grouped = values.contiguous().unflatten(-1, (-1, GROUP))
    powers = exponents(grouped)
    count, step = _steps(grouped.abs() / _power(powers[..., None]))
    codes = (count + torch.where(step < 1, 0.0, 2 * step)).to(torch.uint8)
    codes = (codes | (torch.signbit(grouped).to(torch.uint8) << 3)).unflatten(-1, (16, 2))
    return codes[..., 0] | (codes[..., 1] << 4), (powers + _BIAS).to(torch.uint8)


def dequantize(blocks: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """e2m1 pairs (low nibble first) times 2^(scale - 127): [.., G, 16], [.., G] -> [.., 32 G]."""
    pairs = _pairs(blocks.device)[blocks.reshape(-1).int()].view(*scales.shape, GROUP)
    powers = scales.int()[..., None] - _BIAS
    half = powers >> 1  # 2^-127 is no normal number: by two that are
    return out.copy_((pairs * _power(half) * _power(powers - half)).view(out.shape))


def values_of(pairs: torch.Tensor) -> torch.Tensor:
    """The e2m1 numbers of bytes, low nibble first, [.., n] -> float32 [.., 2 n]."""
    found = _pairs(pairs.device)[pairs.view(torch.uint8).reshape(-1).int()]
    return found.view(*pairs.shape[:-1], -1)


def nearest(grouped: torch.Tensor, exponents: torch.Tensor) -> torch.Tensor:
    """Values [.., n] rounded to e2m1 (ties to even) times 2^exponents [.., 1]."""
    power = _power(exponents)
    count, step = _steps(grouped.abs() / power)
    return torch.copysign(count * step * power, grouped)


def exponents(grouped: torch.Tensor) -> torch.Tensor:
    """The power of two of each group of 32, [.., 32] -> int32 [..]."""
    largest = grouped.abs().amax(-1)
    # frexp: largest = m 2^e with m in [1/2, 1), so e - 3 puts it in [4, 8)
    origin = torch.where(largest > 0, torch.frexp(largest).exponent - 3, 0)
    best, least = torch.zeros_like(origin), torch.full_like(largest, torch.inf)
    for offset in _CANDIDATES:
        tried = (origin + offset).clamp(-_LARGEST, _LARGEST)
        error = (nearest(grouped, tried[..., None]) - grouped).square().sum(-1)
        best = torch.where(error < least, tried, best)
        least = torch.minimum(error, least)
    return best.to(torch.int32)


def _power(exponents: torch.Tensor) -> torch.Tensor:
    """2^exponents, float32, by its bits: not every device's pow is exact."""
    return ((exponents.to(torch.int32) + _BIAS) << 23).view(torch.float32)


def _steps(magnitudes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest e2m1 magnitude as a count of the spacing there, and that; ties to even codes.

    It is spaced by 0.5 up to 2, by 1 up to 4, by 2 up to 6, where counts and codes are even alike.
    """
    clipped = magnitudes.clamp(max=_TOP)
    step = torch.where(clipped < 2, 0.5, torch.where(clipped < 4, 1.0, 2.0))
    return torch.round(clipped / step), step


def _pairs(device: torch.device) -> torch.Tensor:
    """[256, 2]: the two values of every byte."""
    values = torch.tensor([*_E2M1, *(-v for v in _E2M1)], device=device)
    byte = torch.arange(256, device=device)
    return torch.stack([values[byte & 15], values[byte >> 4]], dim=1)
