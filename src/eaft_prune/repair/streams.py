"""The residual stream layer by layer, of the unpruned and of the pruned model side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from eaft_prune.checkpoints.pad import padded
from eaft_prune.core.types import Blocks, KeepPlan, UserError
from eaft_prune.engines import experts as moe
from eaft_prune.engines.base import OnTokens
from eaft_prune.engines.transformers import TransformersEngine
from eaft_prune.repair.gauss_newton import Linearised
from eaft_prune.repair.least_squares import Features, Groups


@dataclass(frozen=True)
class _Asked:
    """What experts of a layer were asked: hidden states [N, H], ids, router weights [N, K]."""

    hidden: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor

    def at(self, rows: torch.Tensor) -> _Asked:
        return _Asked(self.hidden[rows], self.ids[rows], self.weights[rows])


@dataclass(frozen=True)
class Streams:
    """Both models' streams before the next layer, batch by batch, and what comes after them."""

    engine: TransformersEngine
    plan: KeepPlan
    layout: KeepPlan  # what a checkpoint holds: in a ragged plan also experts no token reaches
    predictors: list[torch.Tensor]  # of each batch: flat positions that predict a scored token
    unpruned: list[torch.Tensor]  # of each batch [b, S, H]
    pruned: list[torch.Tensor]
    arguments: list[dict[str, Any]]  # of each layer's call, besides the stream
    entered: list[torch.Tensor] = field(default_factory=list)  # pruned, before the layer done last
    asked: list[_Asked] = field(default_factory=list)  # of that layer's experts


def _untold(tokens: int) -> None:
    """Forwards beyond the two of every layer, which a progress bar does not count."""


@torch.inference_mode()
def start(engine: TransformersEngine, plan: KeepPlan, blocks: Blocks) -> Streams:
    """Both streams as they enter the first layer: the embeddings.

    Raises UserError where layers lie on several devices: streams would have to follow them.
    """
    if len({next(layer.parameters()).device for layer in _layers(engine)}) > 1:
        raise UserError(
            "pruning.compensation runs on one device, and this model's layers are spread over "
            "several: show it one GPU (layers that do not fit are streamed)"
        )
    embed, layers = engine.model.get_input_embeddings(), _layers(engine)
    arguments: list[dict[str, Any]] = []

    def note(module: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        arguments.append(named)

    handles = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    try:
        # without padding they depend on the length alone and broadcast over the batch
        ids = torch.from_numpy(blocks.ids_BS[:1]).long().to(engine.device)
        engine.model.base_model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    batches = list(engine.batches(blocks))
    entered = [embed(ids) for ids, _, _ in batches]
    predictors = [rows for _, rows, _ in batches]
    return Streams(engine, plan, padded(plan), predictors, entered, list(entered), arguments)


@torch.inference_mode()
def step(streams: Streams, layer: int, on_tokens: OnTokens) -> torch.Tensor:
    """Both streams through one layer; returns unpruned minus pruned at predictors, [T, H] float32.

    The pruned stream is routed among the kept experts of the plan, whose weights are the base's.
    """
    streams.unpruned[:] = _forward(streams, layer, streams.unpruned, on_tokens)
    streams.entered[:] = streams.pruned
    return again(streams, layer, on_tokens)


@torch.inference_mode()
def again(streams: Streams, layer: int, on_tokens: OnTokens = _untold) -> torch.Tensor:
    """The pruned stream once more through the layer of the last `step`, as its weights are now."""
    streams.asked.clear()
    listening = _listening(_experts(streams, layer), streams.asked.append)
    with streams.engine.masked(streams.plan), listening:
        streams.pruned[:] = _forward(streams, layer, streams.entered, on_tokens)
    return torch.cat(
        [
            (kept.flatten(0, 1)[rows] - cut.flatten(0, 1)[rows]).float()
            for kept, cut, rows in zip(
                streams.unpruned, streams.pruned, streams.predictors, strict=True
            )
        ]
    )


@torch.inference_mode()
def features(streams: Streams, layer: int, inner: bool) -> Features:
    """Per expert j of the layout the rows g_j (h_j, 1) of predictors routed to it; or g_j alone.

    h_j is the expert's activation between its two projections, g_j its router weight; the layer is
    the one of the last `step`. What is added to down_proj and its bias is linear in these.
    """
    experts = _experts(streams, layer)
    asked = _at_predictors(streams)
    rows_of, values_of = [], []
    for expert in streams.layout.kept[layer]:
        rows, weights = _routed(asked, expert)
        values = weights[:, None].float()
        if inner:
            h = _inner(experts, expert, asked.hidden[rows]).float()
            values = torch.cat([h * values, values], dim=1)
        rows_of.append(rows)
        values_of.append(values)
    return Features(len(asked.ids), tuple(rows_of), tuple(values_of))


@torch.inference_mode()
def correct(streams: Streams, layer: int, weight_KIH: torch.Tensor, bias_KH: torch.Tensor) -> None:
    """Add to the pruned stream what these changes of down_proj and its bias change, everywhere."""
    experts = _experts(streams, layer)
    for number, asked in enumerate(streams.asked):
        change = torch.zeros_like(asked.hidden, dtype=torch.float32)
        for place, expert in enumerate(streams.layout.kept[layer]):
            rows, weights = _routed(asked, expert)
            h = _inner(experts, expert, asked.hidden[rows]).float()
            change[rows] += weights[:, None].float() * (h @ weight_KIH[place] + bias_KH[place])
        stream = streams.pruned[number]
        streams.pruned[number] = (stream.float() + change.view(stream.shape)).to(stream.dtype)


@torch.inference_mode()
def linearised(streams: Streams, layer: int) -> Linearised:
    """How the layout's experts' outputs at predictors move with their gate_up projections."""
    experts, asked = _experts(streams, layer), _at_predictors(streams)
    rows_of, slopes_of = [], []
    for expert in streams.layout.kept[layer]:
        rows, weights = _routed(asked, expert)
        inner = _gate_up(experts, expert, asked.hidden[rows])
        rows_of.append(rows)
        slopes_of.append(_slopes(experts, inner).float() * weights[:, None].float())
    hidden = asked.hidden.float()
    ones = hidden.new_ones(len(hidden), 1)
    down_KIH, _ = projections(streams, layer, "down_proj")
    slopes = Groups(len(hidden), tuple(rows_of), tuple(slopes_of))
    return Linearised(torch.cat([hidden, ones], 1), slopes, down_KIH)


def projections(streams: Streams, layer: int, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A projection [K, in, out] and its bias of the layout's K experts, float32 copies."""
    experts, kept = _experts(streams, layer), streams.layout.kept[layer]
    weights = [moe.weight(experts, name, expert).float().clone() for expert in kept]
    return torch.stack(weights), getattr(experts, f"{name}_bias")[list(kept)].detach().float()


def replaced(
    streams: Streams, layer: int, name: str, stored: Mapping[str, torch.Tensor]
) -> AbstractContextManager[None]:
    """Inside, a projection of the layout's experts and its bias are those of these tensors."""
    return moe.replaced(_experts(streams, layer), name, streams.layout.kept[layer], stored)


def _forward(
    streams: Streams, layer: int, stream: Sequence[torch.Tensor], on_tokens: OnTokens
) -> list[torch.Tensor]:
    module, out = _layers(streams.engine)[layer], []
    for hidden in stream:
        out.append(module(hidden, **streams.arguments[layer]))
        on_tokens(hidden.shape[0] * hidden.shape[1])
    return out


def _layers(engine: TransformersEngine) -> list[Any]:
    return list(engine.model.base_model.layers)


def _experts(streams: Streams, layer: int) -> Any:
    return streams.engine.family.experts(streams.engine.model)[layer]


def _at_predictors(streams: Streams) -> _Asked:
    parts = [asked.at(rows) for asked, rows in zip(streams.asked, streams.predictors, strict=True)]
    return _Asked(*(torch.cat(part) for part in zip(*map(_parts, parts), strict=True)))


def _parts(asked: _Asked) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return asked.hidden, asked.ids, asked.weights


def _routed(asked: _Asked, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions routed to an expert, ascending, and its router weights there."""
    rows, slots = (asked.ids == expert).nonzero(as_tuple=True)
    return rows, asked.weights[rows, slots]


def _inner(experts: Any, expert: int, hidden: torch.Tensor) -> torch.Tensor:
    """Activations [n, I] between an expert's two projections."""
    inner: torch.Tensor = experts._apply_gate(_gate_up(experts, expert, hidden))
    return inner


def _gate_up(experts: Any, expert: int, hidden: torch.Tensor) -> torch.Tensor:
    """[n, 2I], before the activation."""
    matrix = moe.weight(experts, "gate_up_proj", expert)
    return torch.addmm(experts.gate_up_proj_bias[expert], hidden, matrix)


def _slopes(experts: Any, inner: torch.Tensor) -> torch.Tensor:
    """[n, 2I]: how each activation moves with the two columns that make it."""
    with torch.inference_mode(False), torch.enable_grad():
        leaf = inner.clone().requires_grad_()
        (slopes,) = torch.autograd.grad(experts._apply_gate(leaf).sum(), leaf)
    return slopes


@contextmanager
def _listening(experts: Any, keep: Callable[[_Asked], None]) -> Iterator[None]:
    """Inside, `keep` gets what the experts are asked, forward by forward."""

    def note(module: Any, given: tuple[torch.Tensor, ...]) -> None:
        keep(_Asked(*given))

    handle = experts.register_forward_pre_hook(note)
    try:
        yield
    finally:
        handle.remove()
