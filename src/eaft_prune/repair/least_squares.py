"""Ridge least squares on features of which each token has a few groups of columns only.

min over X of ||D - F X||^2 + penalty ||X||^2, one penalty for all columns, so that those the tokens
hardly move are not fitted to noise. All groups are solved for jointly, by conjugate gradients that
the inverses of each group's own Gram matrix precondition. Shapes: T tokens, K groups of C columns,
H targets a token.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self

import torch

from eaft_prune.repair.conjugate_gradients import fast_products, minimised

ITERATIONS = 30  # at most
TOLERANCE = 1e-4  # ends where an iteration lowers the objective by less than this of what all did
_JITTERS = (0.0, *(10.0**power for power in range(-12, 0)))  # of the mean diagonal


@dataclass(frozen=True)
class Groups:
    """A matrix by groups of C columns: group j has values[j][i] in row rows[j][i], else zeros.

    Values may lie in host memory; they are copied to where the rows lie when they are asked for.
    """

    tokens: int
    rows: tuple[torch.Tensor, ...]  # [n_j] int64, ascending, each at most once
    values: tuple[torch.Tensor, ...]  # [n_j, C]

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for rows, values in zip(self.rows, self.values, strict=True):
            yield rows, values.to(rows.device)

    def of(self, chosen_T: torch.Tensor) -> Self:
        """The same columns of the tokens that are true in `chosen_T`, numbered anew."""
        number = torch.cumsum(chosen_T, 0) - 1
        here = [chosen_T[rows] for rows in self.rows]
        return replace(
            self,
            tokens=int(chosen_T.sum()),
            rows=tuple(number[rows[hit]] for rows, hit in zip(self.rows, here, strict=True)),
            values=tuple(
                values[hit.to(values.device)] for values, hit in zip(self.values, here, strict=True)
            ),
        )


@dataclass(frozen=True)
class Features(Groups):
    """F [T, K C]."""

    @property
    def columns(self) -> int:
        """C."""
        return int(self.values[0].shape[1])

    def product(self, x_KCH: torch.Tensor) -> torch.Tensor:
        """F X, [T, H]."""
        out = x_KCH.new_zeros(self.tokens, x_KCH.shape[2])
        for (rows, values), x in zip(self, x_KCH, strict=True):
            out[rows] += values.to(x.dtype) @ x
        return out

    def pulled(self, rest_TH: torch.Tensor) -> torch.Tensor:
        """F' R, [K, C, H]."""
        return torch.stack([values.to(rest_TH.dtype).T @ rest_TH[rows] for rows, values in self])

    def grams(self) -> torch.Tensor:
        """Each group's F'F, [K, C, C], in the type that factorisations are done in."""
        dtype = exact(self.rows[0].device)
        return torch.stack([values.to(dtype).T @ values.to(dtype) for _, values in self])


def exact(device: torch.device) -> torch.dtype:
    """float64 where the device is good at it, else float32."""
    if device.type != "cuda":
        return torch.float64
    good = torch.cuda.get_device_capability(device) in ((8, 0), (9, 0))
    return torch.float64 if good else torch.float32


def squares(rest_TH: torch.Tensor) -> float:
    """||R||^2, summed in float64."""
    parts = torch.split(rest_TH, 8192)
    return math.fsum(float(part.double().square().sum()) for part in parts)


def mean_square(grams_KCC: torch.Tensor) -> float:
    """Mean of diag(F'F)."""
    return float(grams_KCC.diagonal(dim1=1, dim2=2).double().mean())


def regularised(grams_KCC: torch.Tensor, penalty: float) -> torch.Tensor:
    """F'F + penalty I; the identity where no column is anything."""
    out = grams_KCC.clone()
    out.diagonal(dim1=-2, dim2=-1).add_(penalty if penalty or bool(grams_KCC.any()) else 1.0)
    return out


def factors(matrices_KCC: torch.Tensor) -> torch.Tensor | None:
    """Lower Cholesky factors; None of matrices that are not finite.

    A matrix that rounding makes indefinite gets a multiple of the identity, ten times as much until
    its factorisation holds.
    """
    if not bool(torch.isfinite(matrices_KCC).all()):
        return None
    means_K = matrices_KCC.diagonal(dim1=1, dim2=2).mean(1)
    found, info_K = torch.linalg.cholesky_ex(matrices_KCC)
    for jitter in _JITTERS[1:]:
        bad = info_K != 0
        if not bool(bad.any()):
            break
        tried = matrices_KCC[bad]
        tried.diagonal(dim1=1, dim2=2).add_(jitter * means_K[bad, None])
        found[bad], info_K[bad] = torch.linalg.cholesky_ex(tried)
    lower: torch.Tensor | None = None if bool(info_K.any()) else found
    return lower


def solve(
    features: Features,
    target_TH: torch.Tensor,
    penalty: float,
    grams_KCC: torch.Tensor,
    tolerance: float = TOLERANCE,
) -> torch.Tensor | None:
    """X [K, C, H], every target with steps of its own; None where numbers are not finite."""
    lower = factors(regularised(grams_KCC, penalty))
    if lower is None:
        return None
    inverses = torch.cholesky_inverse(lower).to(target_TH.dtype)

    def applied(x_KCH: torch.Tensor) -> torch.Tensor:
        return features.pulled(features.product(x_KCH)).add_(x_KCH, alpha=penalty)

    with fast_products():
        return minimised(
            applied,
            lambda rest_KCH: inverses @ rest_KCH,
            features.pulled(target_TH),
            (0, 1),
            ITERATIONS,
            tolerance,
        )
