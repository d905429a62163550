"""Rounding to what a format can hold, with each error handed on to the rows after it."""

from __future__ import annotations

import torch

from eaft_prune.checkpoints.formats.base import Grid
from eaft_prune.repair.least_squares import cholesky


def with_feedback(
    weights_UH: torch.Tensor, metric_UU: torch.Tensor, rounded: int, grid: Grid
) -> torch.Tensor:
    """Weights whose first `rounded` rows the grid can hold, near in tr((W - Q)' metric (W - Q)).

    [.., U, H] and [.., U, U]: one problem, or several in step.

    Row after row is rounded and its error made good by the rows after it as far as they can (GPTQ,
    Frantar et al. 2022, arXiv:2210.17323); a group of rows shares a scale per column, chosen when
    the first of them is reached. Rows from `rounded` on stay as exact as they come.
    """
    spread = cholesky(torch.cholesky_inverse(cholesky(metric_UU))).mT
    out = weights_UH.clone()
    for first in range(0, rounded, grid.group):
        group = slice(first, first + grid.group)
        scales = grid.scales(out[..., group, :].mT)
        errors = torch.empty_like(out[..., group, :])
        for row in range(first, first + grid.group):
            value = grid.nearest(out[..., row, :], scales)
            error = (out[..., row, :] - value) / spread[..., row, row, None]
            out[..., row, :] = value
            later = slice(row + 1, first + grid.group)
            out[..., later, :] -= spread[..., row, later, None] * error[..., None, :]
            errors[..., row - first, :] = error
        out[..., first + grid.group :, :] -= spread[..., group, first + grid.group :].mT @ errors
    return out
