"""The residual stream layer by layer, of the unpruned and of the pruned model side by side.

The pruned stream is the layer's without what its experts add, plus that of `Experts` at hand: so
other weights are tried without the model, whose own stay as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from eaft_prune.checkpoints.families.sliced_routers import KEPT
from eaft_prune.checkpoints.pad import padded
from eaft_prune.core.types import Blocks, KeepPlan, UserError
from eaft_prune.engines.base import OnTokens
from eaft_prune.engines.head import Head
from eaft_prune.engines.transformers import TransformersEngine
from eaft_prune.repair.entering import OTHER_BUILD, called_with, entering, layers_of, moved
from eaft_prune.repair.experts import Asked, Experts, joined, of_module
from eaft_prune.repair.gauss_newton import Linearised
from eaft_prune.repair.least_squares import Features, Groups

# how far rounding takes a layer's output, of what its experts add and of itself
_ROUNDING = {torch.float32: (1e-3, 1e-5), torch.bfloat16: (0.05, 0.01), torch.float16: (0.05, 0.01)}


@dataclass(frozen=True)
class Streams:
    """Both models' streams before the next layer, batch by batch, and what comes after them.

    They lie on `place`: the device, or host memory where they do not fit there.
    """

    engine: TransformersEngine
    plan: KeepPlan
    layout: KeepPlan  # what a checkpoint holds: in a ragged plan also experts no token reaches
    place: torch.device
    predictors: list[torch.Tensor]  # of each batch: flat positions that predict a scored token
    unpruned: list[torch.Tensor]  # of each batch [b, S, H]
    pruned: list[torch.Tensor]
    arguments: list[dict[str, Any]]  # of each layer's call, besides the stream
    places: tuple[int, ...]  # which of the layers, experts or none, hold those of each layer's plan
    head: Head  # what makes logits of the stream behind the norm


@dataclass(frozen=True)
class Behind:
    """One layer's output of both models; of the pruned one less what its experts add."""

    device: torch.device  # of the layer
    predictors: list[torch.Tensor]
    unpruned: list[torch.Tensor]
    rest: list[torch.Tensor]
    asked: list[Asked]

    def goal(self) -> torch.Tensor:
        """What the pruned model's experts should add at the predictors, [T, H] float32."""
        parts = zip(self.unpruned, self.rest, self.predictors, strict=True)
        return torch.cat(
            [self._at(whole, rows) - self._at(cut, rows) for whole, cut, rows in parts]
        )

    def at_predictors(self) -> Asked:
        """What the experts are asked there."""
        parts = []
        for asked, rows in zip(self.asked, self.predictors, strict=True):
            here = asked.at(rows.to(asked.hidden.device))
            parts.append(
                Asked(*(part.to(self.device) for part in (here.hidden, here.ids, here.gates)))
            )
        return joined(parts)

    def _at(self, stream: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return stream.flatten(0, 1)[rows.to(stream.device)].to(self.device).float()


@torch.inference_mode()
def start(
    engine: TransformersEngine, plan: KeepPlan, blocks: Blocks, place: torch.device
) -> Streams:
    """Both streams as they enter the first layer.

    Raises UserError for a model of another build.
    """
    ids = torch.from_numpy(blocks.ids_BS[[0, -1]]).long().to(engine.device)
    arguments, head = called_with(engine, ids[:1], ids[1:])
    batches = list(engine.batches(blocks))
    entered = [entering(engine, ids).to(place) for ids, _, _ in batches]
    predictors = [rows for _, rows, _ in batches]
    places = places_of(engine)
    return Streams(
        engine,
        plan,
        padded(plan),
        place,
        predictors,
        entered,
        list(entered),
        arguments,
        places,
        head,
    )


@torch.inference_mode()
def pass_by(streams: Streams, layer: int) -> None:
    """Both streams through the layers without experts before those of the plan's layer.

    Its number of layers: those behind the last.
    """
    first = streams.places[layer - 1] + 1 if layer else 0
    end = streams.places[layer] if layer < len(streams.places) else len(streams.arguments)
    for number in range(first, end):
        module = layers_of(streams.engine)[number]
        device = next(module.parameters()).device
        arguments = moved(streams.arguments[number], device)
        for stream in (streams.unpruned, streams.pruned):
            for batch, hidden in enumerate(stream):
                stream[batch] = module(hidden.to(device), **arguments).to(streams.place)


@torch.inference_mode()
def step(streams: Streams, layer: int, experts: Experts, on_tokens: OnTokens) -> Behind:
    """Both streams through one layer; the pruned one is routed among the kept experts of the plan.

    `experts` are the layer's as the model has them. Raises UserError for a model whose layers do
    more with what experts put out than add it.
    """
    place = streams.places[layer]
    module = layers_of(streams.engine)[place]
    device = next(module.parameters()).device
    arguments = moved(streams.arguments[place], device)

    def through(stream: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        out = []
        for hidden in stream:
            out.append(module(hidden.to(device), **arguments).to(streams.place))
            on_tokens(hidden.shape[0] * hidden.shape[1])
        return out

    asked: list[Asked] = []
    streams.unpruned[:] = through(streams.unpruned)
    with streams.engine.masked(streams.plan):
        first = streams.pruned[0][:1].to(device)
        whole = module(first, **arguments)
        with _silent(experts.module, asked.append):
            rest = module(first, **arguments)
            _check_added(whole, rest, asked.pop(), experts)
            behind = through(streams.pruned)
    streams.pruned.clear()
    places = [
        Asked(*(part.to(streams.place) for part in (one.hidden, one.ids, one.gates)))
        for one in asked
    ]
    return Behind(device, streams.predictors, streams.unpruned, behind, places)


@torch.inference_mode()
def leave(streams: Streams, behind: Behind, experts: Experts) -> None:
    """The pruned stream behind the layer of these experts."""
    for rest, asked in zip(behind.rest, behind.asked, strict=True):
        parts = (part.to(behind.device) for part in (asked.hidden, asked.ids, asked.gates))
        added = experts.outputs(Asked(*parts)).view(rest.shape)
        stream = (rest.to(behind.device).float() + added).to(rest.dtype)
        streams.pruned.append(stream.to(streams.place))


def features(
    asked: Asked, experts: Experts, roots_T: torch.Tensor, inner: bool, place: torch.device
) -> Features:
    """Per expert j the rows g_j (h_j, 1) of the tokens routed to it, or g_j alone, times roots.

    h_j is the expert's activation between its two projections, g_j its router weight. What is added
    to down_proj and its bias is linear in these.
    """
    rows_of, values_of = [], []
    routed = asked.routed(experts.module.num_experts, experts.ids)
    for number, (rows, gates) in enumerate(routed):
        values = (gates * roots_T[rows])[:, None]
        if inner:
            values = experts.activations(number, asked.hidden[rows]) * values
        rows_of.append(rows)
        values_of.append(values.to(place))
    return Features(len(asked.ids), tuple(rows_of), tuple(values_of))


def linearised(
    asked: Asked, experts: Experts, roots_T: torch.Tensor, place: torch.device
) -> Linearised:
    """How the experts' outputs, times the roots of the token weights, move with gate_up."""
    rows_of, slopes_of = [], []
    routed = asked.routed(experts.module.num_experts, experts.ids)
    for number, (rows, gates) in enumerate(routed):
        slopes = experts.pairs(experts.slopes(number, asked.hidden[rows])).flatten(1)
        rows_of.append(rows)
        slopes = slopes.mul_((gates * roots_T[rows])[:, None])
        slopes_of.append(slopes.to(place, asked.hidden.dtype))  # no more digits than the inputs
    slopes_by_expert = Groups(len(asked.ids), tuple(rows_of), tuple(slopes_of))
    down_KIH = experts.down_KCH[:, : experts.inner]
    return Linearised(experts.with_one(asked.hidden), slopes_by_expert, down_KIH)


def check_build(engine: TransformersEngine) -> None:
    """Raise UserError unless the model is embeddings, layers, one with experts each, and a norm."""
    body = engine.model.base_model
    if not hasattr(body, "layers") or not hasattr(body, "norm"):
        raise UserError(OTHER_BUILD.format("is more than a language model"))
    if len(places_of(engine)) != len(engine.family.experts(engine.model)):
        raise UserError(OTHER_BUILD.format("has experts outside of its layers, or several a layer"))


def places_of(engine: TransformersEngine) -> tuple[int, ...]:
    """Which of `layers_of` hold experts."""
    held = {id(experts) for experts in engine.family.experts(engine.model)}
    return tuple(
        number
        for number, layer in enumerate(layers_of(engine))
        if any(id(module) in held for module in layer.modules())
    )


def experts_of(streams: Streams, layer: int) -> Experts:
    """The experts that a checkpoint of the plan holds of a layer, as the model has them."""
    module = streams.engine.family.experts(streams.engine.model)[layer]
    return of_module(module, streams.layout.kept[layer])


def _check_added(whole: torch.Tensor, rest: torch.Tensor, asked: Asked, experts: Experts) -> None:
    """Raise UserError unless a layer's output is that without its experts plus theirs."""
    added = experts.outputs(asked).view(rest.shape)
    away, parts, all_of_it = (
        float(torch.linalg.vector_norm(part.float()))
        for part in (whole.float() - rest.float() - added, added, whole)
    )
    of_parts, of_all = _ROUNDING[whole.dtype]
    if away > of_parts * parts + of_all * all_of_it:
        raise UserError(
            f"pruning.compensation: a layer around {type(experts.module).__name__} does more with "
            "what its experts put out than add it; use pruning.compensation=none"
        )


@contextmanager
def _silent(experts: Any, keep: Callable[[Asked], None]) -> Iterator[None]:
    """Inside, experts add nothing, and `keep` gets what they are asked, forward by forward."""

    def forward(hidden: torch.Tensor, ids: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        kept = getattr(experts, KEPT, None)  # under a mask routers give the ids of those kept
        keep(Asked(hidden, ids if kept is None else kept[ids], gates))
        return torch.zeros_like(hidden)

    experts.forward = forward
    try:
        yield
    finally:
        del experts.forward
