"""Rounding to what a format can hold, with each error handed on to the rows after it."""

from __future__ import annotations

import torch

from eaft_prune.checkpoints.formats.base import Grid
from eaft_prune.repair.conjugate_gradients import fast_products
from eaft_prune.repair.least_squares import factors


def with_feedback(
    weights_KUH: torch.Tensor, metric_KUU: torch.Tensor, rounded: int, grid: Grid
) -> torch.Tensor:
    """Weights whose first `rounded` rows the grid can hold, near in tr((W - Q)' metric (W - Q)).

    K experts, [K, U, H] and [K, U, U], in step: row after row is rounded and its error made good by
    the rows after it as far as they can (GPTQ, Frantar et al. 2022, arXiv:2210.17323); a group of
    rows shares a scale per column, chosen when the first of them is reached, and later groups learn
    of its errors in one product. Rows from `rounded` on stay as exact as they come. Rounded one by
    one where the metric is not finite.
    """
    out = weights_KUH.clone()
    spread = _spread(metric_KUU)
    if spread is None:
        spread = torch.eye(metric_KUU.shape[1], device=out.device).expand_as(metric_KUU)
    spread = spread.to(out.dtype)
    with fast_products():
        for first in range(0, rounded, grid.group):
            end = first + grid.group
            here = out[:, first:end]
            scales = grid.scales(here.mT)
            errors = torch.empty_like(here)
            for row in range(grid.group):
                own = spread[:, first + row, first + row : end]
                value = grid.nearest(here[:, row], scales)
                errors[:, row] = (here[:, row] - value) / own[:, :1]
                here[:, row] = value
                here[:, row + 1 :] -= own[:, 1:, None] * errors[:, row, None]
            out[:, end:].baddbmm_(spread[:, first:end, end:].mT, errors, alpha=-1)
    return out


def _spread(metric_KUU: torch.Tensor) -> torch.Tensor | None:
    """Upper Cholesky factors of the metrics' inverses."""
    lower = factors(metric_KUU)
    if lower is None:
        return None
    lower = factors(torch.cholesky_inverse(lower))
    return None if lower is None else lower.mT
