"""Numbers -> MXFP4: to the nearest value, or with each error handed on to the columns after it."""

from __future__ import annotations

import torch

from eaft_prune.repair.least_squares import cholesky

GROUP = 32  # values that share one scale
_TOP = 6.0  # the largest magnitude of e2m1: 0, 0.5, 1, 1.5, 2, 3, 4, 6 by code
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
    exponents = _exponents(grouped)
    count, step = _steps(grouped.abs() / _power(exponents[..., None]))
    codes = (count + torch.where(step < 1, 0.0, 2 * step)).to(torch.uint8)
    codes = (codes | (torch.signbit(grouped).to(torch.uint8) << 3)).unflatten(-1, (16, 2))
    return codes[..., 0] | (codes[..., 1] << 4), (exponents + _BIAS).to(torch.uint8)


def nearest(grouped: torch.Tensor, exponents: torch.Tensor) -> torch.Tensor:
    """Values [.., n] rounded to e2m1 (ties to even) times 2^exponents [.., 1]."""
    power = _power(exponents)
    count, step = _steps(grouped.abs() / power)
    return torch.copysign(count * step * power, grouped)


def with_feedback(weights_UH: torch.Tensor, metric_UU: torch.Tensor, rounded: int) -> torch.Tensor:
    """Weights whose first `rounded` rows MXFP4 can hold, near in tr((W - Q)' metric (W - Q)).

    [.., U, H] and [.., U, U]: one problem, or several in step.

    Row after row is rounded and its error made good by the rows after it as far as they can (GPTQ,
    Frantar et al. 2022, arXiv:2210.17323); 32 rows share a scale per column, chosen when the first
    of them is reached. Rows from `rounded` on stay as exact as they come.
    """
    spread = cholesky(torch.cholesky_inverse(cholesky(metric_UU))).mT
    out = weights_UH.clone()
    for first in range(0, rounded, GROUP):
        group = slice(first, first + GROUP)
        exponents = _exponents(out[..., group, :].mT)
        errors = torch.empty_like(out[..., group, :])
        for row in range(first, first + GROUP):
            value = nearest(out[..., row, :], exponents)
            error = (out[..., row, :] - value) / spread[..., row, row, None]
            out[..., row, :] = value
            later = slice(row + 1, first + GROUP)
            out[..., later, :] -= spread[..., row, later, None] * error[..., None, :]
            errors[..., row - first, :] = error
        out[..., first + GROUP :, :] -= spread[..., group, first + GROUP :].mT @ errors
    return out


def _exponents(grouped: torch.Tensor) -> torch.Tensor:
    """The power of two of each group of 32, [.., 32] -> int32 [..]."""
    largest = grouped.abs().amax(-1)
    # frexp: largest = m 2^e with m in [1/2, 1), so e - 3 puts it in [4, 8)
    origin = torch.where(largest > 0, torch.frexp(largest).exponent - 3, 0)
    best, least = torch.zeros_like(origin), torch.full_like(largest, torch.inf)
    for offset in _CANDIDATES:
        exponents = (origin + offset).clamp(-_LARGEST, _LARGEST)
        error = (nearest(grouped, exponents[..., None]) - grouped).square().sum(-1)
        best = torch.where(error < least, exponents, best)
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
