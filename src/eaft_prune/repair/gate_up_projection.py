"""gate_up projections of kept experts that bring a layer's output nearer to the unpruned one's."""

from __future__ import annotations

import torch

from eaft_prune.checkpoints.formats.base import Storage
from eaft_prune.config.pruning import CompensationSettings
from eaft_prune.repair import streams as residual
from eaft_prune.repair.gauss_newton import step
from eaft_prune.repair.least_squares import squares
from eaft_prune.repair.rounding import with_feedback
from eaft_prune.repair.streams import Streams

_STEPS = (1.0, 0.5, 0.25)  # of the Gauss-Newton step, tried on held-out rows
_RIDGE = 0.03  # of ridge=auto


def gate_up(
    streams: Streams,
    layer: int,
    target_TH: torch.Tensor,
    roots_T: torch.Tensor,
    held_T: torch.Tensor,
    settings: CompensationSettings,
    storage: Storage,
) -> dict[str, torch.Tensor]:
    """Projections and biases as they will be stored, by name; none if held-out rows lose by them.

    One Gauss-Newton step on the rows not held out, of which that part is taken that, once rounded,
    leaves held-out rows least. `target_TH` is weighted by the roots. Leaves the pruned stream
    behind the layer as the last part tried made it.
    """
    fitted = residual.linearised(streams, layer).of(~held_T)
    fitted.slopes.scale_(roots_T[~held_T])
    ridge = _RIDGE if settings.ridge == "auto" else settings.ridge
    x_KXG, metric_KXX = step(fitted, target_TH[~held_T], ridge, settings.iterations)
    weight, bias = residual.projections(streams, layer, "gate_up_proj")
    base_KXG = torch.cat([weight, bias[:, None]], 1)
    least, best = squares(target_TH[held_T]), dict[str, torch.Tensor]()
    for size in _STEPS:
        wanted_KXG = base_KXG + size * x_KXG
        if (grid := storage.weight.grid) is not None and settings.rounding == "feedback":
            wanted_KXG = with_feedback(wanted_KXG, metric_KXX, weight.shape[1], grid)
        parts = storage.weight.encoded("gate_up_proj", wanted_KXG[:, :-1])
        parts["gate_up_proj_bias"] = storage.bias.encode(wanted_KXG[:, -1])[0]
        with residual.replaced(streams, layer, "gate_up_proj", parts):
            rest_TH = residual.again(streams, layer).mul_(roots_T[:, None])
        if (rest := squares(rest_TH[held_T])) < least:
            least, best = rest, parts
    return best
