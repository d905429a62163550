"""How many experts a layer needs: pure functions of masses, integers out."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from eaft_prune.core.types import LayerLosses, UserError


def effective_number(mass_LE: NDArray[np.float64]) -> NDArray[np.float64]:
    """(sum m)^2 / sum m^2 of every layer: the number of equal experts as concentrated as these.

    In [1, E]; the inverse of Simpson's concentration (Simpson, Nature 163, 1949), Hill's number of
    order 2. A layer without mass counts as 1.
    """
    total_L, square_L = mass_LE.sum(axis=1), (mass_LE**2).sum(axis=1)
    number_L = np.ones(len(mass_LE))
    np.divide(total_L**2, square_L, out=number_L, where=square_L > 0)
    return number_L


def fewest(mass_E: NDArray[np.float64], share: float) -> list[int]:
    """The fewest experts that hold `share` of the mass, largest first; ties to the lower id.

    None of no mass.
    """
    order = np.argsort(-mass_E, kind="stable")
    held = np.cumsum(mass_E[order])
    if held[-1] <= 0:
        return []
    # a sum in another order may miss the whole by an ulp: share = 1 takes all that have mass
    need = int(np.searchsorted(held, share * held[-1], "left")) + 1
    return [int(i) for i in order[:need]]


def allocate(
    demand_L: NDArray[np.float64], total: int, low: int, high: int, multiple: int
) -> list[int]:
    """`total` experts shared out over layers in proportion to demand, within low..high.

    Quotas are clip(c * demand, low, high) with the c at which they add up; they are rounded to
    multiples by largest remainder (Hamilton), ties to the lower layer, so the total is exact.
    total, low and high are multiples. Raises UserError unless L * low <= total <= L * high.
    """
    n_layers = len(demand_L)
    assert total % multiple == low % multiple == high % multiple == 0
    if not n_layers * low <= total <= n_layers * high:
        raise UserError(
            f"{total} experts over {n_layers} layers do not fit between pruning.min_keep_n = {low} "
            f"and pruning.max_keep_n = {high} a layer"
        )
    quota_L = _quotas(demand_L, total / multiple, low / multiple, high / multiple)
    # a quota that is whole but for rounding is whole: it has no remainder to be served first
    whole_L = np.floor(quota_L + 1e-9)
    order = np.argsort(-(quota_L - whole_L), kind="stable")
    left = total // multiple - int(whole_L.sum())
    whole_L[order[:left]] += 1
    return [int(n) * multiple for n in whole_L]


def cheapest(losses: LayerLosses, total: int) -> list[int]:
    """The size of every layer, adding up to `total`, of which the summed loss is least; exact.

    Dynamic programming over layers: least[t] = min over sizes n of c[l, n] + least of the layers
    before with t - n. Of equal sums the last layers take the smaller sizes. Raises UserError where
    no choice of sizes adds up to `total`.
    """
    n_layers = len(losses.loss_LN)
    least = np.full(total + 1, np.inf)
    least[0] = 0.0
    choices = []
    for loss_N in losses.loss_LN:
        before = [np.full(total + 1, np.inf) for _ in losses.sizes]
        for size, loss, row in zip(losses.sizes, loss_N, before, strict=True):
            row[size:] = loss + least[: max(total + 1 - size, 0)]
        choices.append(np.argmin(before, axis=0))
        least = np.min(before, axis=0)
    if not np.isfinite(least[total]):
        raise UserError(
            f"{total} experts over {n_layers} layers do not fit between pruning.min_keep_n = "
            f"{losses.sizes[0]} and pruning.max_keep_n = {losses.sizes[-1]} a layer"
        )
    sizes: list[int] = []
    for choice in reversed(choices):
        sizes.append(losses.sizes[int(choice[total - sum(sizes)])])
    return sizes[::-1]


def _quotas(
    demand_L: NDArray[np.float64], total: float, low: float, high: float
) -> NDArray[np.float64]:
    """clip(c * demand, low, high) with sum `total`, by bisection on c."""
    smallest, largest = 0.0, total / float(demand_L.min())
    for _ in range(200):
        middle = (smallest + largest) / 2
        if np.clip(middle * demand_L, low, high).sum() < total:
            smallest = middle
        else:
            largest = middle
    return np.clip(largest * demand_L, low, high)
