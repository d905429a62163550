"""Keep plan -> projections of the kept experts that make up for the dropped ones.

Layer after layer one ridge least squares: at the predictors of scored calibration tokens, the
pruned model's stream after the layer is moved to the unpruned model's. What is added to a layer's
`down_proj` and bias is linear in g_j (h_j, 1) of the kept experts, so the solution is closed-form.
`gate_up_proj` comes before it, where asked for: one Gauss-Newton step, as it is not linear.
The pruned stream that enters a layer has every change before it, rounded as it will be stored.
Rows held out of the fit choose the ridge; a layer whose changes do not help them is left as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from eaft_prune.checkpoints.formats.base import Storage
from eaft_prune.config.pruning import CompensationSettings
from eaft_prune.core.types import Blocks, KeepPlan, UserError
from eaft_prune.engines.base import OnTokens
from eaft_prune.engines.transformers import TransformersEngine
from eaft_prune.repair import streams as residual
from eaft_prune.repair.gate_up_projection import gate_up
from eaft_prune.repair.least_squares import (
    Features,
    gauss_seidel,
    gram,
    product,
    regularised,
    solve,
    squares,
)
from eaft_prune.repair.rounding import with_feedback
from eaft_prune.repair.streams import Streams

RIDGES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # of ridge=auto
_HELD_OUT = 0.2  # of the calibration rows

Level = Literal["bias", "down_proj", "experts"]


@dataclass(frozen=True)
class Compensation:
    """Bytes of the changed tensors of the kept experts one after another, and how well it went.

    tensors: (layer, name, shape, bytes) in the order of `data`; the name is that within the
    layer's experts, such as `down_proj_bias` or `gate_up_proj_blocks`. The residuals of each layer
    are sum_t w_t ||D_t - F_t X||^2 / sum_t w_t ||D_t||^2, D = unpruned - pruned stream and w the
    token weights: of all calibration tokens as solved and as stored, of held-out rows by a fit
    without them, and by one on half of the rows it had. With `gate_up_proj` the first D_t is what
    its change leaves, which was fitted on the rows not held out. Lower is better, 1 is a layer left
    as it was.
    """

    data: NDArray[np.uint8]
    tensors: tuple[tuple[int, str, tuple[int, ...], int], ...]
    ridges: tuple[float, ...]
    solved: tuple[float, ...]
    stored: tuple[float, ...]
    held_out: tuple[float, ...]
    held_out_by_half: tuple[float, ...]
    scored_tokens: int


@dataclass(frozen=True)
class _Split:
    """Of every scored token: is its row held out; else, is it of the half that is fitted first."""

    held_T: torch.Tensor
    half_T: torch.Tensor


@dataclass(frozen=True)
class _Choice:
    """A ridge, and the residuals on held-out rows of a fit on the others and on half of those."""

    ridge: float
    held_out: float
    by_half: float


@dataclass(frozen=True)
class _Layer:
    """Changed tensors by their names within the experts, and the layer's part of a Compensation."""

    parts: dict[str, torch.Tensor]
    ridge: float
    solved: float
    stored: float
    held_out: float
    by_half: float


@torch.inference_mode()
def compensate(
    engine: TransformersEngine,
    plan: KeepPlan,
    blocks: Blocks,
    level: Level,
    settings: CompensationSettings,
    storage: Storage,
    on_tokens: OnTokens,
) -> Compensation:
    """Changes of `down_proj_bias`, of `down_proj` too, or of `gate_up_proj` too, of kept experts.

    Of a ragged plan also the experts that fill its layers up to one size, which no token reaches
    and which stay as they are.
    A layer is left as it is where the fit helps no held-out rows, or its rounded changes not even
    those it was fitted to. Reports the tokens of both streams, layer by layer, to `on_tokens`.
    """
    split = _split(blocks, settings.seed, engine.device)
    streams = residual.start(engine, plan, blocks)
    layers = [
        _layer(streams, layer, level, split, settings, storage, on_tokens)
        for layer in range(len(plan.kept))
    ]
    parts = [(i, name, part) for i, done in enumerate(layers) for name, part in done.parts.items()]
    data = [part.contiguous().cpu().reshape(-1).view(torch.uint8).numpy() for *_, part in parts]
    return Compensation(
        np.concatenate([np.empty(0, np.uint8), *data]),
        tuple((i, name, tuple(part.shape), part.nbytes) for i, name, part in parts),
        tuple(done.ridge for done in layers),
        tuple(done.solved for done in layers),
        tuple(done.stored for done in layers),
        tuple(done.held_out for done in layers),
        tuple(done.by_half for done in layers),
        blocks.scored_tokens,
    )


def _layer(
    streams: Streams,
    layer: int,
    level: Level,
    split: _Split,
    settings: CompensationSettings,
    storage: Storage,
    on_tokens: OnTokens,
) -> _Layer:
    """Both streams through one layer, and what its experts become; the pruned one has it."""
    target_TH = residual.step(streams, layer, on_tokens)
    roots_T = _roots(target_TH, settings)
    target_TH.mul_(roots_T[:, None])
    before, held_before = squares(target_TH), squares(target_TH[split.held_T])
    parts: dict[str, torch.Tensor] = {}
    with ExitStack() as changed:
        if level == "experts":
            parts = gate_up(streams, layer, target_TH, roots_T, split.held_T, settings, storage)
            if parts:
                changed.enter_context(residual.replaced(streams, layer, "gate_up_proj", parts))
            target_TH = residual.again(streams, layer).mul_(roots_T[:, None])
        now, held_now = squares(target_TH), squares(target_TH[split.held_T])
        features = residual.features(streams, layer, inner=level != "bias")
        features.scale_(roots_T)
        choice = _choice(features, target_TH, split, settings)
        weight, bias = residual.projections(streams, layer, "down_proj")
        base_UH = bias if level == "bias" else torch.cat([weight.flatten(0, 1), bias])
        x_UH, rounded_UH = _fit(features, target_TH, base_UH, choice.ridge, settings, storage)
        after = _rest(features, target_TH, rounded_UH - base_UH)
        solved = _rest(features, target_TH, x_UH)
        if choice.held_out < 1 and after < now:
            new_weight, new_bias = weight, rounded_UH[-len(bias) :]
            if level != "bias":
                new_weight = rounded_UH[: -len(bias)].view(weight.shape)
                parts |= storage.weight.encoded("down_proj", new_weight)
            parts["down_proj_bias"] = storage.bias.encode(new_bias)[0]
            residual.correct(streams, layer, new_weight - weight, new_bias - bias)
        else:
            solved = after = now
    return _Layer(
        parts,
        choice.ridge,
        _share(solved, before),
        _share(after, before),
        choice.held_out * _share(held_now, held_before),
        choice.by_half * _share(held_now, held_before),
    )


def _roots(target_TH: torch.Tensor, settings: CompensationSettings) -> torch.Tensor:
    """Roots of the token weights; of robust ones w_t = m / (||D_t||^2 + m), m = mean ||D_t||^2.

    Cauchy's weights, at the uncompensated residual. Where a dropped expert would have been chosen
    with a large weight, the streams lie far apart; such tokens are few, make up most of the squares
    and are lost anyway.
    """
    squares_T = target_TH.square().sum(1)
    mean = squares_T.mean()
    if settings.token_weights == "uniform" or not mean > 0:
        return torch.ones_like(squares_T)
    return (mean / (squares_T + mean)).sqrt()


def _split(blocks: Blocks, seed: int, device: torch.device) -> _Split:
    """Raises UserError where there are too few rows to hold any out."""
    row_T = blocks.row_BS[blocks.scored_BS]
    rows = np.random.default_rng(seed).permutation(np.unique(row_T))
    held = max(1, round(len(rows) * _HELD_OUT))
    half = held + (len(rows) - held) // 2
    if half == held:
        raise UserError(
            f"compensation.num_blocks gives scored tokens of {len(rows)} rows, too few to hold any "
            "out: raise it"
        )
    held_T, half_T = np.isin(row_T, rows[:held]), np.isin(row_T, rows[held:half])
    return _Split(torch.from_numpy(held_T).to(device), torch.from_numpy(half_T).to(device))


def _choice(
    features: Features, target_TH: torch.Tensor, split: _Split, settings: CompensationSettings
) -> _Choice:
    """The ridge asked for, or that of RIDGES whose fit is nearest on held-out rows."""
    held, held_TH = features.of(split.held_T), target_TH[split.held_T]
    before = squares(held_TH)

    def residuals(fitted_T: torch.Tensor, ridges: Sequence[float]) -> list[float]:
        solver = _Solver(features.of(fitted_T), target_TH[fitted_T], settings)
        return [_rest(held, held_TH, solver(ridge)) / before if before else 1.0 for ridge in ridges]

    ridges = RIDGES if settings.ridge == "auto" else (settings.ridge,)
    rests = residuals(~split.held_T, ridges)
    best = int(np.argmin(rests))
    (by_half,) = residuals(split.half_T, ridges[best : best + 1])
    return _Choice(ridges[best], rests[best], by_half)


class _Solver:
    """One problem at any ridge; its Gram matrix, where that is small enough, is made once."""

    def __init__(
        self, features: Features, target_TH: torch.Tensor, settings: CompensationSettings
    ) -> None:
        self.features, self.target_TH = features, target_TH
        self.mean_square = features.mean_square
        # a GPU's float64 is slow and its memory small
        self.dtype = torch.float32 if target_TH.device.type == "cuda" else torch.float64
        self.gram = None
        if features.unknowns <= settings.exact_unknowns:
            self.gram = gram(features, target_TH, self.dtype)

    def __call__(self, ridge: float) -> torch.Tensor:
        if self.gram is None:
            penalty = ridge * self.mean_square
            return gauss_seidel(self.features, self.target_TH, penalty, self.dtype)
        return solve(*self.gram, ridge * self.mean_square)

    def metrics(self, ridge: float) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(unknowns, F'F + penalty I between them): all of them, or one group at a time."""
        if self.gram is not None:
            everything = torch.arange(self.features.unknowns, device=self.target_TH.device)
            return [(everything, regularised(self.gram[0], ridge * self.mean_square))]
        out = []
        for group, values in enumerate(self.features.values):
            own = values.to(self.dtype)
            out.append(
                (self.features.columns(group), regularised(own.T @ own, ridge * self.mean_square))
            )
        return out


def _fit(
    features: Features,
    target_TH: torch.Tensor,
    base_UH: torch.Tensor,
    ridge: float,
    settings: CompensationSettings,
    storage: Storage,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What to add, and the weights with it as they will be stored (float32)."""
    solver = _Solver(features, target_TH, settings)
    x_UH = solver(ridge)
    wanted_UH = base_UH.to(x_UH.dtype) + x_UH
    groups = len(features.values)
    weights = features.unknowns - groups  # of the unknowns; the others are biases
    form = storage.weight
    if form.grid is not None and settings.rounding == "feedback" and weights:
        for columns, metric_UU in solver.metrics(ridge):
            rounded = int((columns < weights).sum())
            wanted_UH[columns] = with_feedback(wanted_UH[columns], metric_UU, rounded, form.grid)
    wanted_UH = wanted_UH.float()
    rounded_UH = wanted_UH.clone()
    rounded_UH[weights:] = storage.bias.encode(wanted_UH[weights:])[0].float()
    if weights:
        per_expert = wanted_UH[:weights].view(groups, -1, wanted_UH.shape[1])
        rounded_UH[:weights] = form.decode(form.encode(per_expert)).flatten(0, 1)
    return x_UH, rounded_UH


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 1.0


def _rest(features: Features, target_TH: torch.Tensor, x_UH: torch.Tensor) -> float:
    """||D - F X||^2, summed in float64."""
    return squares(target_TH.double() - product(features, x_UH.double()))
