"""One layer: what its kept experts become so that its output is nearer to the unpruned one's.

First one Gauss-Newton step of `gate_up_proj`, where asked for, then least squares of `down_proj`
and its bias, in which the layer is linear. Fitted on calibration rows that are not held out; the
held-out ones choose the ridge, the length of the step, and whether a change is made at all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch

from eaft_prune.checkpoints.formats.base import Storage
from eaft_prune.config.pruning import CompensationSettings
from eaft_prune.repair.experts import Asked, Experts
from eaft_prune.repair.gauss_newton import step
from eaft_prune.repair.least_squares import Features, mean_square, regularised, solve, squares
from eaft_prune.repair.rounding import with_feedback
from eaft_prune.repair.streams import Behind, features, linearised

RIDGES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # of ridge=auto
_STEPS = (1.0, 0.5, 0.25)  # of the Gauss-Newton step
_RIDGE = 0.03  # of that step, where ridge=auto
_PROJECTIONS = 32  # of the targets, that ridges are chosen on
_ROUGHLY = 1e-3  # how well those are solved for, of the objective

Level = Literal["bias", "down_proj", "experts"]


@dataclass(frozen=True)
class How:
    """What of the kept experts is changed, how that is solved for and how it will be stored."""

    level: Level
    settings: CompensationSettings
    storage: Storage


@dataclass(frozen=True)
class Task:
    """What is asked of every layer."""

    how: How
    held_T: torch.Tensor  # of every scored token: is its row held out
    half_T: torch.Tensor  # else: is it of the half that is fitted for comparison
    place: torch.device  # where streams lie

    def holds(self, device: torch.device) -> torch.device:
        """Where features lie of a layer on this device: there, or where streams lie if hosted."""
        return device if self.place.type == device.type else self.place


@dataclass(frozen=True)
class Fit:
    """What a layer's experts became, as stored, and how well that went: shares of the squares
    between the streams as they were, fitted rows first, then held-out ones.

    No ridge: numbers were not finite at any.
    """

    stored: dict[str, torch.Tensor]
    ridge: float | None
    solved: float  # before rounding
    fitted: float
    held_out: float
    by_half: float  # held-out rows, by half of the others


@dataclass(frozen=True)
class _Part:
    """Some of the calibration tokens: what their experts are asked and should add, and of that
    what is missing, times the roots of the token weights.
    """

    asked: Asked
    goal_TH: torch.Tensor
    roots_T: torch.Tensor
    missing_TH: torch.Tensor

    def of(self, chosen_T: torch.Tensor) -> _Part:
        parts = (part[chosen_T] for part in (self.goal_TH, self.roots_T, self.missing_TH))
        return _Part(self.asked.at(chosen_T), *parts)

    def with_experts(self, experts: Experts) -> _Part:
        """The same with what is missing behind these experts."""
        missing_TH = (self.goal_TH - experts.outputs(self.asked)).mul_(self.roots_T[:, None])
        return replace(self, missing_TH=missing_TH)


@dataclass(frozen=True)
class _Choice:
    """A ridge, and the shares left of held-out rows by fits on the others and on half of those."""

    ridge: float
    by_half: float


@torch.inference_mode()
def fit(behind: Behind, experts: Experts, task: Task) -> Fit:
    """What a layer's experts become; `experts` are those of the pass before."""
    seen, held = _parts(behind, experts, task)
    fit = Fit({}, None, squares(seen.missing_TH), 0.0, squares(held.missing_TH), 1.0)
    if task.how.level == "experts":
        stored = _gate_up(experts, seen, held, task)
        if stored:
            experts = experts.with_stored(stored, task.how.storage)
            seen, held = seen.with_experts(experts), held.with_experts(experts)
            fit = replace(fit, stored=stored)
    return _down(experts, seen, held, task, fit)


def _parts(behind: Behind, experts: Experts, task: Task) -> tuple[_Part, _Part]:
    """Tokens that changes are fitted to, and held-out ones."""
    asked, goal_TH = behind.at_predictors(), behind.goal()
    missing_TH = goal_TH - experts.outputs(asked)
    roots_T = _roots(missing_TH, task.how.settings)
    whole = _Part(asked, goal_TH, roots_T, missing_TH.mul_(roots_T[:, None]))
    held_T = task.held_T.to(behind.device)
    return whole.of(~held_T), whole.of(held_T)


def _gate_up(experts: Experts, seen: _Part, held: _Part, task: Task) -> dict[str, torch.Tensor]:
    """Projections as they will be stored, by name; none if held-out rows lose by them.

    One Gauss-Newton step, of which that part is taken that leaves held-out rows least.
    """
    settings, storage = task.how.settings, task.how.storage
    ridge = _RIDGE if settings.ridge == "auto" else settings.ridge
    place = task.holds(seen.goal_TH.device)
    layer = linearised(seen.asked, experts, seen.roots_T, place)
    found = step(layer, seen.missing_TH, ridge, settings.iterations)
    del layer
    if found is None:
        return {}
    halves_KXG, metric_KXX = found
    x_KXG = experts.unpaired(halves_KXG.view(*halves_KXG.shape[:2], 2, -1))

    def left(size: float) -> float:
        return squares(held.with_experts(experts.plus(gate_up_KXG=size * x_KXG)).missing_TH)

    wanted = experts.plus(gate_up_KXG=min(_STEPS, key=left) * x_KXG)
    if storage.weight.grid is not None and settings.rounding == "feedback":
        rows, grid = experts.hidden, storage.weight.grid
        fed = with_feedback(wanted.gate_up_KXG, metric_KXX, rows, grid)
        wanted = replace(wanted, gate_up_KXG=fed)
    stored = wanted.stored(("gate_up_proj",), storage)
    after = held.with_experts(experts.with_stored(stored, storage))
    return stored if squares(after.missing_TH) < squares(held.missing_TH) else {}


def _down(experts: Experts, seen: _Part, held: _Part, task: Task, before: Fit) -> Fit:
    """Down projections and biases, or the biases alone, after what `before` has changed.

    `before` has squares in place of shares.
    """
    inner, storage = task.how.level != "bias", task.how.storage
    target_TH, held_TH = seen.missing_TH, held.missing_TH
    place = task.holds(target_TH.device)
    now, held_now = squares(target_TH), squares(held_TH)
    f, held_f = (features(part.asked, experts, part.roots_T, inner, place) for part in (seen, held))
    grams_KCC = f.grams()
    half_T = task.half_T[~task.held_T].to(target_TH.device)
    choice = _choice((f, target_TH), (held_f, held_TH), half_T, grams_KCC, task.how.settings)
    left = replace(before, solved=now, fitted=now, held_out=held_now)
    if choice is not None:
        penalty = choice.ridge * mean_square(grams_KCC)
        x_KCH = solve(f, target_TH, penalty, grams_KCC)
        assert x_KCH is not None, "its factors were found for the choice"
        wanted = experts.plus(down_KCH=x_KCH)
        if inner and storage.weight.grid is not None and task.how.settings.rounding == "feedback":
            metric_KCC = regularised(grams_KCC, penalty)
            rows, grid = experts.inner, storage.weight.grid
            fed = with_feedback(wanted.down_KCH, metric_KCC, rows, grid)
            wanted = replace(wanted, down_KCH=fed)
        parts = wanted.stored(("down_proj",), storage)
        if not inner:
            parts = {name: part for name, part in parts.items() if name == "down_proj_bias"}
        change_KCH = experts.with_stored(parts, storage).down_KCH - experts.down_KCH
        change_KCH = change_KCH[:, -f.columns :]
        after, held_after = _rest(f, target_TH, change_KCH), _rest(held_f, held_TH, change_KCH)
        left = replace(left, ridge=choice.ridge, by_half=choice.by_half * held_now)
        if after < now and held_after < held_now:
            solved, stored = _rest(f, target_TH, x_KCH), {**before.stored, **parts}
            left = replace(left, stored=stored, solved=solved, fitted=after, held_out=held_after)
    return replace(
        left,
        solved=_share(left.solved, before.solved),
        fitted=_share(left.fitted, before.solved),
        held_out=_share(left.held_out, before.held_out),
        by_half=_share(left.by_half, before.held_out),
    )


def _choice(
    seen: tuple[Features, torch.Tensor],
    held: tuple[Features, torch.Tensor],
    half_T: torch.Tensor,
    grams_KCC: torch.Tensor,
    settings: CompensationSettings,
) -> _Choice | None:
    """The ridge asked for, or that of RIDGES whose fit is nearest on held-out rows.

    On random projections of the targets, whose squares are the targets' on average; None where no
    ridge has a solution.
    """
    project_HP = _projection(seen[1], settings.seed)
    target_TP, held_TP = seen[1] @ project_HP, held[1] @ project_HP
    before, scale = squares(held_TP), mean_square(grams_KCC)

    def left(f: Features, goal_TP: torch.Tensor, ridge: float, grams: torch.Tensor) -> float:
        x_KCP = solve(f, goal_TP, ridge * scale, grams, _ROUGHLY)
        return math.inf if x_KCP is None else _share(_rest(held[0], held_TP, x_KCP), before)

    ridges = RIDGES if settings.ridge == "auto" else (settings.ridge,)
    lefts = [left(seen[0], target_TP, ridge, grams_KCC) for ridge in ridges]
    best = min(range(len(ridges)), key=lefts.__getitem__)
    if math.isinf(lefts[best]):
        return None
    half = seen[0].of(half_T)
    return _Choice(ridges[best], left(half, target_TP[half_T], ridges[best], half.grams()))


def _projection(target_TH: torch.Tensor, seed: int) -> torch.Tensor:
    """[H, P] whose product with its transpose is the identity on average; that, if H is small."""
    size = target_TH.shape[1]
    if size <= _PROJECTIONS:
        return torch.eye(size, dtype=target_TH.dtype, device=target_TH.device)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(size, _PROJECTIONS, generator=generator).mul_(_PROJECTIONS**-0.5)
    return drawn.to(target_TH)


def _roots(missing_TH: torch.Tensor, settings: CompensationSettings) -> torch.Tensor:
    """Roots of the token weights; of robust ones w_t = m / (||D_t||^2 + m), m = mean ||D_t||^2.

    Cauchy's weights, at the residual as it is. Where a dropped expert would have been chosen
    with a large weight, the streams lie far apart; such tokens are few, make up most of the squares
    and are lost anyway.
    """
    squares_T = missing_TH.square().sum(1)
    mean = squares_T.mean()
    if settings.token_weights == "uniform" or not mean > 0:
        return torch.ones_like(squares_T)
    roots_T: torch.Tensor = (mean / (squares_T + mean)).sqrt()
    return roots_T


def _rest(f: Features, target_TH: torch.Tensor, x_KCH: torch.Tensor) -> float:
    """||D - F X||^2, summed in float64."""
    return squares(target_TH - f.product(x_KCH))


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 1.0
