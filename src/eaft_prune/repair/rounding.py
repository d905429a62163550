"""Rounding to what a format can hold, with each error made good by other rows."""

from __future__ import annotations

from functools import partial

import torch

from eaft_prune.checkpoints.formats.base import Grid
from eaft_prune.repair.conjugate_gradients import fast_products
from eaft_prune.repair.graphs import replayed
from eaft_prune.repair.least_squares import factors


def with_feedback(
    weights_KUH: torch.Tensor, metric_KUU: torch.Tensor, rounded: int, grid: Grid
) -> torch.Tensor:
    """Weights whose first `rounded` rows the grid can hold, near in tr((W - Q)' metric (W - Q)).

    K experts, [K, U, H] and [K, U, U], in step: row after row is rounded and its error made good by
    the rows after it as far as they can (GPTQ, Frantar et al. 2022, arXiv:2210.17323); a group of
    rows shares a scale per column, chosen when the first of them is reached, and later groups learn
    of its errors in one product. Then every row is rounded once more, to what is best beside the
    others as they are now (coordinate descent as in QuantEase, Behdin et al. 2023,
    arXiv:2309.01885). Rows from `rounded` on stay as exact as they come. Rounded one by one where
    the metric is not finite.
    """
    spread_KUU = _spread(metric_KUU)
    if spread_KUU is None:
        whole = torch.eye(metric_KUU.shape[1], device=weights_KUH.device)
        none_KUU = whole.to(weights_KUH.dtype).expand_as(metric_KUU)
        return _handed_on(weights_KUH, none_KUU, rounded, grid)[0]
    with fast_products():
        out, scales = _handed_on(weights_KUH, spread_KUU.to(weights_KUH.dtype), rounded, grid)
        del spread_KUU
        return _once_more(out, scales, weights_KUH, metric_KUU, grid)


def _handed_on(
    weights_KUH: torch.Tensor, spread_KUU: torch.Tensor, rounded: int, grid: Grid
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Rounded rows, and the scales of every group, [K, H]."""
    out, chosen = weights_KUH.clone(), []
    size = grid.group
    round_group = replayed(
        partial(_round_group, grid=grid), out[:, :size], spread_KUU[:, :size, :size]
    )
    for first in range(0, rounded, size):
        end = first + size
        values, errors, scales = round_group(out[:, first:end], spread_KUU[:, first:end, first:end])
        out[:, first:end] = values
        out[:, end:].baddbmm_(spread_KUU[:, first:end, end:].mT, errors, alpha=-1)
        chosen.append(scales.clone())
    return out, chosen


def _round_group(
    rows_KGH: torch.Tensor, spread_KGG: torch.Tensor, grid: Grid
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows of one group rounded, in turn; the errors to hand on; their scales, [K, H]."""
    here, scales = rows_KGH.clone(), grid.scales(rows_KGH.mT)
    errors = torch.empty_like(here)
    for row in range(grid.group):
        own = spread_KGG[:, row, row:]
        value = grid.nearest(here[:, row, :, None], scales[..., None])[..., 0]
        errors[:, row] = (here[:, row] - value) / own[:, :1]
        here[:, row] = value
        here[:, row + 1 :] -= own[:, 1:, None] * errors[:, row, None]
    return here, errors, scales


def _once_more(
    out: torch.Tensor,
    scales: list[torch.Tensor],
    weights_KUH: torch.Tensor,
    metric_KUU: torch.Tensor,
    grid: Grid,
) -> torch.Tensor:
    """Every row in turn at its best beside the others: the error in the metric never grows."""
    pull_KUH = torch.empty_like(out)  # of each row: metric (Q - W)
    for pull, metric, now, wanted in zip(pull_KUH, metric_KUU, out, weights_KUH, strict=True):
        pull.copy_(metric @ (now - wanted).to(metric.dtype))
    metric_KUU = metric_KUU.to(out.dtype)
    sizes_KU = metric_KUU.diagonal(dim1=1, dim2=2)
    size = grid.group
    move_group = replayed(
        partial(_move_group, grid=grid), out[:, :size], pull_KUH[:, :size],
        metric_KUU[:, :size, :size], scales[0],
    )  # fmt: skip
    for group, own in enumerate(scales):
        first, end = group * size, (group + 1) * size
        values, moved = move_group(
            out[:, first:end], pull_KUH[:, first:end], metric_KUU[:, first:end, first:end], own
        )
        out[:, first:end] = values
        # rows before it are done with
        pull_KUH[:, end:].baddbmm_(metric_KUU[:, end:, first:end], moved)
    for row in range(len(scales) * grid.group, out.shape[1]):  # biases are exact
        step = pull_KUH[:, row] / sizes_KU[:, row, None]
        out[:, row] -= step
        pull_KUH -= metric_KUU[:, :, row, None] * step[:, None]
    return out


def _move_group(
    rows_KGH: torch.Tensor,
    pull_KGH: torch.Tensor,
    metric_KGG: torch.Tensor,
    scales_KH: torch.Tensor,
    grid: Grid,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of one group, in turn at their best beside the others, and how far they moved."""
    here, pulled, moved = rows_KGH.clone(), pull_KGH.clone(), torch.empty_like(rows_KGH)
    for row in range(grid.group):
        best = here[:, row] - pulled[:, row] / metric_KGG[:, row, row, None]
        value = grid.nearest(best[..., None], scales_KH[..., None])[..., 0]
        moved[:, row] = value - here[:, row]
        here[:, row] = value
        pulled += metric_KGG[:, :, row, None] * moved[:, row, None]
    return here, moved


def _spread(metric_KUU: torch.Tensor) -> torch.Tensor | None:
    """Upper Cholesky factors of the metrics' inverses."""
    lower = factors(metric_KUU)
    if lower is None:
        return None
    lower = factors(torch.cholesky_inverse(lower))
    return None if lower is None else lower.mT
