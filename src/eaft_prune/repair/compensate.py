"""Keep plan -> projections of the kept experts that make up for the dropped ones.

Layer after layer the pruned model's stream is moved to the unpruned model's, at the predictors of
scored calibration tokens (layer.py). The pruned stream that enters a layer has every change before
it, rounded as it will be stored. A pass does so for all layers; the next one starts from what the
last left, with the same target, unless held-out rows lose by it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from eaft_prune.checkpoints.formats.base import Storage
from eaft_prune.checkpoints.pad import padded
from eaft_prune.core.types import Blocks, KeepPlan, UserError
from eaft_prune.engines.base import OnTokens
from eaft_prune.engines.transformers import TransformersEngine
from eaft_prune.repair import streams as residual
from eaft_prune.repair.distance import distance
from eaft_prune.repair.experts import Experts
from eaft_prune.repair.layer import How, Task, fit
from eaft_prune.repair.memory import place_of
from eaft_prune.repair.streams import Behind, Streams

_HELD_OUT = 0.1  # of the calibration rows
_NOISE = 1.01  # a pass that takes held-out rows farther than so many times away is not taken

_KINDS = {
    "U8": torch.uint8, "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32,
}  # fmt: skip

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerResult:
    """Bytes of one layer's changed tensors one after another, and how well it went.

    tensors: (name, shape, bytes) in the order of `data`. The rest is that of `layer.Fit`.
    """

    data: NDArray[np.uint8]
    tensors: tuple[tuple[str, tuple[int, ...], int], ...]
    ridge: float | None
    solved: float
    stored: float
    held_out: float
    held_out_by_half: float


@dataclass(frozen=True)
class Compensation:
    """Bytes of the changed tensors of the kept experts one after another, and how well it went.

    tensors: (layer, name, shape, bytes) in the order of `data`; the name is that within the
    layer's experts, such as `down_proj_bias` or `gate_up_proj_blocks`. Of each layer in the last
    pass, as shares of sum_t w_t ||D_t||^2 before it, D = unpruned - pruned stream and w the token
    weights: what is left of fitted rows as solved and as stored, of held-out rows as stored, and of
    those by a fit on half of the others. Lower is better, 1 is a layer left as it was; a ridge of
    None: nothing is dropped up to it, or its numbers are not finite. distances: mean KL divergence,
    nats, of predictions on held-out rows from the unpruned model's, after each pass that was tried.
    """

    data: NDArray[np.uint8]
    tensors: tuple[tuple[int, str, tuple[int, ...], int], ...]
    ridges: tuple[float | None, ...]
    solved: tuple[float, ...]
    stored: tuple[float, ...]
    held_out: tuple[float, ...]
    held_out_by_half: tuple[float, ...]
    distances: tuple[float, ...]
    passes: int  # taken
    scored_tokens: int


_UNTOUCHED = LayerResult(np.empty(0, np.uint8), (), None, 1.0, 1.0, 1.0, 1.0)

# name of a layer's part of the work, and the work: a store may have its result
Kept = Callable[[str, Callable[[], LayerResult]], LayerResult]


def not_kept(name: str, compute: Callable[[], LayerResult]) -> LayerResult:
    """Every layer computed."""
    return compute()


@dataclass(frozen=True)
class _State:
    """The stored tensors that differ from the base's, and results, layer by layer."""

    parts: tuple[dict[str, torch.Tensor], ...]
    layers: tuple[LayerResult, ...]


@torch.inference_mode()
def compensate(
    engine: TransformersEngine,
    plan: KeepPlan,
    blocks: Blocks,
    how: How,
    on_tokens: OnTokens,
    kept: Kept = not_kept,
) -> Compensation:
    """Changes of `down_proj_bias`, of `down_proj` too, or of `gate_up_proj` too, of kept experts.

    Of a ragged plan also the experts that fill its layers up to one size, which no token reaches
    and which stay as they are. A layer is left as it is where the change helps no held-out rows, or
    not even those it was fitted to. Reports each token of a layer twice a pass to `on_tokens`: in
    the unpruned stream, and when the layer is done. Raises UserError where memory is too small.
    """
    task = _task(engine, plan, blocks, how)
    best, distances, taken = _State(({},) * len(plan.kept), ()), list[float](), 0
    for number in range(how.settings.passes):
        streams = residual.start(engine, plan, blocks, task.place)
        state = _pass(streams, best, number, task, on_tokens, kept)
        distances.append(distance(streams, task.held_T))
        log.info("pass %d: held-out rows %.5f nats from the base", number + 1, distances[-1])
        if number and not distances[-1] <= _NOISE * min(distances[:-1]):
            break
        best, taken = state, number + 1
    return _collected(best, tuple(distances), taken, blocks.scored_tokens)


def _task(engine: TransformersEngine, plan: KeepPlan, blocks: Blocks, how: How) -> Task:
    """Raises UserError where there are too few rows to hold any out, too little memory, or where
    biases are asked for and there are none.
    """
    residual.check_build(engine)
    if how.level == "bias" and how.storage.bias is None:
        raise UserError(
            f"pruning.compensation = 'bias': experts of {engine.family.model_type} have no biases; "
            "use down_proj"
        )
    row_T = blocks.row_BS[blocks.scored_BS]
    rows = np.random.default_rng(how.settings.seed).permutation(np.unique(row_T))
    held = max(1, round(len(rows) * _HELD_OUT))
    half = held + (len(rows) - held) // 2
    if half == held:
        raise UserError(
            f"compensation.num_blocks gives scored tokens of {len(rows)} rows, too few to hold any "
            "out: raise it"
        )
    held_T, half_T = np.isin(row_T, rows[:held]), np.isin(row_T, rows[held:half])
    place = place_of(engine, padded(plan), blocks, how.level)
    return Task(how, torch.from_numpy(held_T), torch.from_numpy(half_T), place)


def _pass(
    streams: Streams, before: _State, number: int, task: Task, on_tokens: OnTokens, kept: Kept
) -> _State:
    """Every layer once, from what the pass before left of it."""
    parts, layers = [], []
    for layer, known in enumerate(before.parts):
        residual.pass_by(streams, layer)
        base = residual.experts_of(streams, layer)
        behind = residual.step(streams, layer, base, on_tokens)
        experts = base.with_stored(known, task.how.storage)
        result = _UNTOUCHED
        if any(len(ids) < streams.plan.n_experts for ids in streams.plan.kept[: layer + 1]):
            result = kept(f"{number}/{layer}", partial(_result, behind, experts, task))
            if result.ridge is None:
                log.warning("layer %d is left as it is: its numbers are not finite", layer)
        now = {**known, **_tensors(result, task.how.storage)}
        residual.leave(streams, behind, base.with_stored(now, task.how.storage))
        on_tokens(sum(hidden.shape[0] * hidden.shape[1] for hidden in streams.pruned))
        parts.append(now)
        layers.append(result)
    residual.pass_by(streams, len(streams.places))
    return _State(tuple(parts), tuple(layers))


def _result(behind: Behind, experts: Experts, task: Task) -> LayerResult:
    done = fit(behind, experts, task)
    return LayerResult(
        _bytes(done.stored.values()),
        tuple((name, tuple(part.shape), part.nbytes) for name, part in done.stored.items()),
        done.ridge,
        done.solved,
        done.fitted,
        done.held_out,
        done.by_half,
    )


def _bytes(parts: Iterable[torch.Tensor]) -> NDArray[np.uint8]:
    data = [part.contiguous().cpu().reshape(-1).view(torch.uint8).numpy() for part in parts]
    return np.concatenate([np.empty(0, np.uint8), *data])


def _tensors(result: LayerResult, storage: Storage) -> dict[str, torch.Tensor]:
    """What `_bytes` was made of, in host memory."""
    parts, start = {}, 0
    for name, shape, nbytes in result.tensors:
        form = storage.bias if name.endswith("_bias") else storage.weight
        assert form is not None, f"{name} of experts without biases"
        kind = _KINDS[form.parts[0].dtype or form.name]
        data = torch.from_numpy(result.data[start : start + nbytes].copy())
        parts[name] = data.view(kind).view(shape)
        start += nbytes
    return parts


def _collected(
    state: _State, distances: tuple[float, ...], passes: int, scored_tokens: int
) -> Compensation:
    found = [(i, name, part) for i, parts in enumerate(state.parts) for name, part in parts.items()]
    return Compensation(
        _bytes(part for *_, part in found),
        tuple((i, name, tuple(part.shape), part.nbytes) for i, name, part in found),
        tuple(layer.ridge for layer in state.layers),
        tuple(layer.solved for layer in state.layers),
        tuple(layer.stored for layer in state.layers),
        tuple(layer.held_out for layer in state.layers),
        tuple(layer.held_out_by_half for layer in state.layers),
        distances,
        passes,
        scored_tokens,
    )
