"""Are our traced experts the model's experts? Against its eager loop, and against float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from eaft_prune.core.types import Blocks
from eaft_prune.engines import experts
from eaft_prune.engines.transformers import TransformersEngine

_FLOAT64_TOKENS = 64
# relative errors of two right ways to add up an expert's products: some units of the last place
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


@torch.inference_mode()
def expert_math(engine: TransformersEngine, blocks: Blocks) -> dict[str, Any]:
    """Per layer the relative errors ||ours - reference|| / ||reference|| on one block of tokens.

    `eager` is the family's own expert loop as transformers runs it, `float64` a loop over tokens
    and experts in double precision (first 64 tokens), `norm` the recorded norms against the same
    loop's.
    """
    layers = engine.family.experts(engine.model)
    calls: list[tuple[Any, ...]] = []
    with _captured(layers, calls):
        engine.score(blocks, lambda done: None)
    facts: dict[str, Any] = {}
    for layer, (module, hidden, ids, weights) in enumerate(calls[: len(layers)]):
        ours, norms = _ours(module, hidden, ids, weights)
        eager = _eager(module, hidden, ids, weights)
        few = slice(0, _FLOAT64_TOKENS)
        exact, exact_norms = _float64(module, hidden[few], ids[few], weights[few])
        facts[f"layer{layer}_eager"] = _relative(ours, eager)
        facts[f"layer{layer}_float64"] = _relative(ours[few], exact)
        facts[f"layer{layer}_norm"] = _relative(norms[few], exact_norms)
    return facts


def _ours(
    module: Any, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    seen: list[torch.Tensor] = []
    module.eaft_recorder = lambda ids, weights, norms: seen.append(norms)
    try:
        return experts.experts_forward(module, hidden, ids, weights), seen[0]
    finally:
        del module.eaft_recorder


def _eager(
    module: Any, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    config = module.config
    chosen = config._experts_implementation
    try:
        config._experts_implementation = "eager"
        result: torch.Tensor = module(hidden, ids, weights)
        return result
    finally:
        config._experts_implementation = chosen


def _float64(
    module: Any, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    out = torch.zeros(hidden.shape, dtype=torch.float64, device=hidden.device)
    norms = torch.zeros(ids.shape, dtype=torch.float64, device=hidden.device)
    for t in range(len(hidden)):
        for k in range(ids.shape[1]):
            expert = int(ids[t, k])
            first = experts.first_projection(module)
            inner = experts.activated(module, _linear64(module, first, expert, hidden[t].double()))
            value = experts.normed(module, _linear64(module, "down_proj", expert, inner))
            norms[t, k] = value.norm()
            out[t] += weights[t, k].double() * value
    return out, norms


def _linear64(module: Any, name: str, expert: int, x: torch.Tensor) -> torch.Tensor:
    weight = getattr(module, name)[expert].double()
    y: torch.Tensor = x @ weight if module.is_transposed else weight @ x
    if module.has_bias:
        y = y + getattr(module, f"{name}_bias")[expert].double()
    return y


def _relative(value: torch.Tensor, reference: torch.Tensor) -> float:
    gap = torch.linalg.vector_norm(value.double() - reference.double())
    return float(gap / torch.linalg.vector_norm(reference.double()))


@contextmanager
def _captured(layers: list[torch.nn.Module], calls: list[tuple[Any, ...]]) -> Iterator[None]:
    handles = [
        module.register_forward_pre_hook(
            lambda module, args, kwargs: calls.append((module, *args, *kwargs.values())),
            with_kwargs=True,
        )
        for module in layers
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
