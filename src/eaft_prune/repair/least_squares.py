"""Ridge least squares on features of which each token has a few groups of columns only.

min over X of ||D - F X||^2 + ridge m ||X||^2 with m = mean of diag(F'F): one penalty for all
columns, so that those the tokens hardly move are not fitted to noise. Shapes: T tokens, U unknowns
(columns of F), H targets a token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch

from eaft_prune.core.types import UserError

_TOLERANCE = 1e-5  # of Gauss-Seidel: the last sweep's change relative to the solution
_SWEEPS = 100


@dataclass(frozen=True)
class Groups:
    """A matrix by groups of C columns: group j has values[j][i] in row rows[j][i], else zeros."""

    tokens: int
    rows: tuple[torch.Tensor, ...]  # [n_j] int64, ascending, each at most once
    values: tuple[torch.Tensor, ...]  # [n_j, C]

    def scale_(self, factors_T: torch.Tensor) -> None:
        """Multiply every row by its token's factor, in place."""
        for rows, values in zip(self.rows, self.values, strict=True):
            values.mul_(factors_T[rows, None])

    def of(self, chosen_T: torch.Tensor) -> Self:
        """The same columns of the tokens that are true in `chosen_T`, numbered anew."""
        number = torch.cumsum(chosen_T, 0) - 1
        here = [chosen_T[rows] for rows in self.rows]
        return replace(
            self,
            tokens=int(chosen_T.sum()),
            rows=tuple(number[rows[hit]] for rows, hit in zip(self.rows, here, strict=True)),
            values=tuple(values[hit] for values, hit in zip(self.values, here, strict=True)),
        )


@dataclass(frozen=True)
class Features(Groups):
    """F [T, U].

    Of each group's C columns the last one comes after the other columns of all groups: unknowns
    are the C - 1 leading columns of group 0, of group 1, ..., then the last column of each.
    """

    @property
    def unknowns(self) -> int:
        return len(self.values) * int(self.values[0].shape[1])

    @property
    def mean_square(self) -> float:
        """Mean of diag(F'F)."""
        return sum(squares(values) for values in self.values) / self.unknowns

    def columns(self, group: int) -> torch.Tensor:
        """The unknowns of one group, in the order of its columns."""
        groups, leading = len(self.values), int(self.values[0].shape[1]) - 1
        first, device = group * leading, self.rows[0].device
        last = torch.tensor([groups * leading + group], device=device)
        return torch.cat([torch.arange(first, first + leading, device=device), last])


def squares(rest_TH: torch.Tensor) -> float:
    """||R||^2, summed in float64."""
    return float(rest_TH.double().square().sum())


def product(features: Features, x_UH: torch.Tensor) -> torch.Tensor:
    """F X, [T, H], in the type of X."""
    out = x_UH.new_zeros(features.tokens, x_UH.shape[1])
    for group, (rows, values) in enumerate(zip(features.rows, features.values, strict=True)):
        out[rows] += values.to(x_UH.dtype) @ x_UH[features.columns(group)]
    return out


def gram(
    features: Features, target_TH: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """F'F [U, U] and F'D [U, H]; only groups that share tokens are multiplied."""
    device, size = target_TH.device, features.unknowns
    squares = torch.zeros(size, size, dtype=dtype, device=device)
    right = torch.zeros(size, target_TH.shape[1], dtype=dtype, device=device)
    for i, (rows_i, values_i) in enumerate(zip(features.rows, features.values, strict=True)):
        place = torch.full((features.tokens,), -1, device=device)
        place[rows_i] = torch.arange(len(rows_i), device=device)
        columns_i, left = features.columns(i), values_i.to(dtype)
        right[columns_i] = left.T @ target_TH[rows_i].to(dtype)
        for j in range(i, len(features.rows)):
            at = place[features.rows[j]]
            shared = at >= 0
            block = left[at[shared]].T @ features.values[j][shared].to(dtype)
            columns_j = features.columns(j)
            squares[columns_i[:, None], columns_j] = block
            squares[columns_j[:, None], columns_i] = block.T
    return squares, right


def regularised(squares_UU: torch.Tensor, penalty: float) -> torch.Tensor:
    """F'F + penalty I; the identity where both are zero. Of one matrix, or of a stack."""
    out = squares_UU.clone()
    out.diagonal(dim1=-2, dim2=-1).add_(penalty if penalty or bool(squares_UU.any()) else 1.0)
    return out


def solve(squares_UU: torch.Tensor, right_UH: torch.Tensor, penalty: float) -> torch.Tensor:
    """X [U, H] by one Cholesky factorisation; 0 for columns that are zero."""
    return torch.cholesky_solve(right_UH, cholesky(regularised(squares_UU, penalty)))


def cholesky(matrix_UU: torch.Tensor) -> torch.Tensor:
    """Its lower factor; raises UserError where rounding makes a matrix, of a stack, indefinite."""
    factor, info = torch.linalg.cholesky_ex(matrix_UU)
    if bool(info.any()):
        raise UserError(
            "compensation.ridge is too small for the features' correlations at "
            f"{str(matrix_UU.dtype).removeprefix('torch.')}: raise it, or use auto"
        )
    lower: torch.Tensor = factor
    return lower


def gauss_seidel(
    features: Features, target_TH: torch.Tensor, penalty: float, dtype: torch.dtype
) -> torch.Tensor:
    """The same X where [U, U] does not fit: group after group against what the others leave.

    Needs the Gram matrix of one group at a time. Sweeps until X moves by less than 1e-5 of itself,
    a hundred times at most; every step lowers the ridge objective.
    """
    x_UH = torch.zeros(features.unknowns, target_TH.shape[1], dtype=dtype, device=target_TH.device)
    rest_TH = target_TH.to(dtype, copy=True)
    solved = []
    for values in features.values:
        squares = values.to(dtype).T @ values.to(dtype)
        solved.append(cholesky(regularised(squares, penalty)))
    for _ in range(_SWEEPS):
        moved = 0.0
        for group, (rows, values) in enumerate(zip(features.rows, features.values, strict=True)):
            columns, own = features.columns(group), values.to(dtype)
            pull = own.T @ rest_TH[rows] - penalty * x_UH[columns]
            step = torch.cholesky_solve(pull, solved[group])
            x_UH[columns] += step
            rest_TH[rows] -= own @ step
            moved += float(step.square().sum())
        if moved <= _TOLERANCE**2 * float(x_UH.square().sum()):
            break
    return x_UH
