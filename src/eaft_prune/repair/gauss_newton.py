"""One Gauss-Newton step for the gate_up projections of experts whose outputs should move.

Near its weights an expert moves its output at a token by g ((x dW + db) * s) V: x its input, s the
slopes of the activation, V the down projection, g the gate. That is linear in (dW, db), so the
step is a ridge least squares, solved by preconditioned conjugate gradients. Shapes: T tokens, X
inputs (hidden, and a 1 where there are biases), I inner, G = 2I columns of gate_up, K experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from eaft_prune.repair.conjugate_gradients import fast_products, minimised
from eaft_prune.repair.least_squares import Groups, exact, factors, regularised

_TOLERANCE = 1e-3  # an iteration that lowers the objective by less, of what all did, is the last


@dataclass(frozen=True)
class Linearised:
    """How the layer's output [T, H] moves with (dW, db) of K experts.

    Here all first columns of activations come before all second ones, whatever the module's order.
    """

    inputs_TX: torch.Tensor
    slopes: Groups  # an expert a group: the tokens routed to it, [n_j, G], the gate's factor in it
    down_KIH: torch.Tensor

    def moved(self, change_KXG: torch.Tensor) -> torch.Tensor:
        """J X: what (dW, db) [K, X, G] move, [T, H]."""
        out = self.inputs_TX.new_zeros(len(self.inputs_TX), self.down_KIH.shape[2])
        for (rows, slopes, down_IH), change in zip(self._each(), change_KXG, strict=True):
            inner = (self.inputs_TX[rows] @ change).mul_(slopes)
            first, second = inner.chunk(2, 1)
            out[rows] += (first + second) @ down_IH
        return out

    def pulled(self, rest_TH: torch.Tensor) -> torch.Tensor:
        """J' R, [K, X, G]."""
        out = []
        for rows, slopes, down_IH in self._each():
            both = slopes.view(len(rows), 2, len(down_IH))
            back = (rest_TH[rows] @ down_IH.T)[:, None] * both
            out.append(self.inputs_TX[rows].T @ back.flatten(1))
        return torch.stack(out)

    def squares(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of J'J and each expert the mean of its columns' blocks, and each block's mean diagonal.

        [K, X, X] and [K, G]. The block of column c, of activation i, is
        sum_t x_t x_t' s_tc^2 ||V_i||^2.
        """
        dtype = exact(self.inputs_TX.device)
        blocks, diagonals = [], []
        for rows, slopes, down_IH in self._each():
            lengths_G = down_IH.square().sum(1).repeat(2)
            inputs, steep = self.inputs_TX[rows], slopes.square()
            factors_n = (steep @ lengths_G / len(lengths_G)).sqrt()[:, None]
            own = (inputs * factors_n).to(dtype)
            blocks.append(own.T @ own)
            diagonals.append((inputs.square().mean(1) @ steep) * lengths_G)
        return torch.stack(blocks), torch.stack(diagonals)

    def _each(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        for (rows, slopes), down_IH in zip(self.slopes, self.down_KIH, strict=True):
            yield rows, slopes.to(down_IH.dtype), down_IH


def step(
    layer: Linearised, target_TH: torch.Tensor, ridge: float, iterations: int
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """X [K, X, G] near the least ||D - J X||^2 + ridge m ||X||^2, m = mean of diag(J'J).

    Second: of each expert the mean block of its columns + ridge m I, in whose metric its columns
    may be rounded. Conjugate gradients start at 0 and are preconditioned by that metric times the
    columns' relative scale. None where numbers are not finite.
    """
    blocks_KXX, scales_KG = layer.squares()
    penalty = ridge * float(scales_KG.double().mean())
    if not penalty:  # nothing moves anything; any solution is as good as none
        penalty = 1.0
    metric_KXX = regularised(blocks_KXX, penalty)
    lower = factors(metric_KXX)
    if lower is None:
        return None
    inverses = torch.cholesky_inverse(lower).to(target_TH.dtype)
    del blocks_KXX, lower  # of a large model gigabytes
    relative_KG = (scales_KG + penalty) / (scales_KG.mean(1, keepdim=True) + penalty)

    def applied(x_KXG: torch.Tensor) -> torch.Tensor:
        return layer.pulled(layer.moved(x_KXG)).add_(x_KXG, alpha=penalty)

    with fast_products():
        found = minimised(
            applied,
            lambda rest_KXG: (inverses @ rest_KXG).div_(relative_KG[:, None]),
            layer.pulled(target_TH),
            (0, 1, 2),
            iterations,
            _TOLERANCE,
        )
    return found, metric_KXX
