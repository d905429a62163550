"""What enters a model's first layer, and what its layers are called with besides."""

from __future__ import annotations

from typing import Any

import torch

from eaft_prune.core.types import UserError
from eaft_prune.engines.head import Head
from eaft_prune.engines.transformers import TransformersEngine

OTHER_BUILD = "pruning.compensation: this model {}, which cannot be repaired yet; use none"
_ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.05}


class _Entered(Exception):
    """The first layer is reached, with this stream: nothing behind it needs to run."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream


def layers_of(engine: TransformersEngine) -> list[Any]:
    """The decoder layers of its model."""
    return list(engine.model.base_model.layers)


def entering(engine: TransformersEngine, ids: torch.Tensor) -> torch.Tensor:
    """The stream [b, S, H] before the first layer: embeddings, scaled or whatever a model does.

    Raises UserError for a model whose layers are not called with a stream.
    """

    def stop(module: Any, given: tuple[Any, ...]) -> None:
        raise _Entered(given[0] if given else None)

    handle = layers_of(engine)[0].register_forward_pre_hook(stop)
    stream = None
    try:
        engine.model.base_model(input_ids=ids, use_cache=False)
    except _Entered as reached:
        stream = reached.stream
    finally:
        handle.remove()
    if not isinstance(stream, torch.Tensor) or stream.dim() != 3:
        raise UserError(OTHER_BUILD.format("has other streams than one of hidden states"))
    return stream


def called_with(
    engine: TransformersEngine, ids: torch.Tensor, others: torch.Tensor
) -> tuple[list[dict[str, Any]], Head]:
    """What each layer is given besides the stream, for `ids` [1, S], and what makes logits.

    Raises UserError where with it the layers do not take `others` [1, S] to where the model does:
    what they are given depends on more than the length.
    """
    arguments: list[dict[str, Any]] = []
    more = UserError(OTHER_BUILD.format("gives its layers more than a stream of hidden states"))

    def note(module: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        if len(given) != 1:
            raise more
        arguments.append(named)

    body = engine.model.base_model
    handles = [
        layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers_of(engine)
    ]
    try:
        out = body(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    stream = entering(engine, others)
    for layer, named in zip(layers_of(engine), arguments, strict=True):
        device = next(layer.parameters()).device
        stream = layer(stream.to(device), **moved(named, device))
        if not isinstance(stream, torch.Tensor):
            raise UserError(OTHER_BUILD.format("has layers that give more than a stream"))
    ours = body.norm(stream.to(next(body.norm.parameters()).device)).float()
    theirs = body(input_ids=others, use_cache=False).last_hidden_state
    away = float((ours - theirs.to(ours.device).float()).norm())
    if away > _ROUNDING[theirs.dtype] * float(ours.norm()):
        raise more
    return arguments, engine.head_behind(out)


def moved(arguments: Any, device: torch.device) -> Any:
    """Tensors, in tuples and dicts too, on a device."""
    match arguments:
        case torch.Tensor():
            return arguments.to(device)
        case tuple():
            return tuple(moved(item, device) for item in arguments)
        case dict():
            return {name: moved(item, device) for name, item in arguments.items()}
    return arguments
