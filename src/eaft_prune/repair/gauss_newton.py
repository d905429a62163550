"""One Gauss-Newton step for the gate_up projections of experts whose outputs should move.

Near its weights an expert moves its output at a token by g ((x dW + db) * s) V: x its input, s the
slopes of the activation, V the down projection, g the gate. That is linear in (dW, db), so the
step is a ridge least squares, solved by preconditioned conjugate gradients. Shapes: T tokens, H
hidden, I inner, 2I columns of gate_up of which 2i and 2i + 1 make activation i, K experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from eaft_prune.repair.least_squares import Groups, cholesky, regularised


@dataclass(frozen=True)
class Linearised:
    """How the layer's output [T, H] moves with (dW, db) of K experts."""

    inputs_TX: torch.Tensor  # x and a 1, [T, H + 1]
    slopes: Groups  # an expert a group: the tokens routed to it, [n_j, 2I], the gate's factor in it
    down_KIH: torch.Tensor

    def of(self, chosen_T: torch.Tensor) -> Linearised:
        """The tokens that are true in `chosen_T`, numbered anew."""
        return Linearised(self.inputs_TX[chosen_T], self.slopes.of(chosen_T), self.down_KIH)

    def moved(self, change_KXG: torch.Tensor) -> torch.Tensor:
        """J X: what (dW, db) [K, H + 1, 2I] move, [T, H]."""
        out = self.inputs_TX.new_zeros(len(self.inputs_TX), self.down_KIH.shape[2])
        for expert, (rows, slopes) in enumerate(self._experts()):
            inner = (self.inputs_TX[rows] @ change_KXG[expert]) * slopes
            out.index_add_(0, rows, (inner[:, 0::2] + inner[:, 1::2]) @ self.down_KIH[expert])
        return out

    def pulled(self, rest_TH: torch.Tensor) -> torch.Tensor:
        """J' R, [K, H + 1, 2I]."""
        out = []
        for expert, (rows, slopes) in enumerate(self._experts()):
            back = (rest_TH[rows] @ self.down_KIH[expert].T).repeat_interleave(2, 1) * slopes
            out.append(self.inputs_TX[rows].T @ back)
        return torch.stack(out)

    def squares(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of J'J and each expert the mean of its columns' blocks, and each block's mean diagonal.

        [K, H + 1, H + 1] and [K, 2I]. The block of column c, of activation i, is
        sum_t x_t x_t' s_tc^2 ||V_i||^2.
        """
        lengths_KG = self.down_KIH.square().sum(2).repeat_interleave(2, 1)
        blocks, diagonals = [], []
        for expert, (rows, slopes) in enumerate(self._experts()):
            lengths_G = lengths_KG[expert]
            inputs, steep = self.inputs_TX[rows], slopes.square()
            blocks.append((inputs * (steep @ lengths_G)[:, None]).T @ inputs / len(lengths_G))
            diagonals.append((inputs.square().mean(1) @ steep) * lengths_G)
        return torch.stack(blocks), torch.stack(diagonals)

    def _experts(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return zip(self.slopes.rows, self.slopes.values, strict=True)


def step(
    layer: Linearised, target_TH: torch.Tensor, ridge: float, iterations: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """X [K, H + 1, 2I] near the least ||D - J X||^2 + ridge m ||X||^2, m = mean of diag(J'J).

    Second: of each expert the mean block of its columns + ridge m I, in whose metric its columns
    may be rounded. Conjugate gradients start at 0 and are preconditioned by that metric times the
    columns' relative scale.
    """
    blocks_KXX, scales_KG = layer.squares()
    penalty = ridge * float(scales_KG.mean())
    if not penalty:  # nothing moves anything; any solution is as good as none
        penalty = 1.0
    metric_KXX = regularised(blocks_KXX, penalty)
    factor_KXX = cholesky(metric_KXX)
    relative_KG = (scales_KG + penalty) / (scales_KG.mean(1, keepdim=True) + penalty)

    def near(right_KXG: torch.Tensor) -> torch.Tensor:
        return torch.cholesky_solve(right_KXG, factor_KXX) / relative_KG[:, None]

    rest = layer.pulled(target_TH)
    x = torch.zeros_like(rest)
    towards = way = near(rest)
    size = float((rest * towards).sum())
    for _ in range(iterations):
        if size <= 0:
            break
        applied = layer.pulled(layer.moved(way)) + penalty * way
        length = size / float((way * applied).sum())
        x += length * way
        rest = rest - length * applied
        towards = near(rest)
        before, size = size, float((rest * towards).sum())
        way = towards + (size / before) * way
    return x, metric_KXX
