"""A model's own norms and attention on CUDA in bfloat16, each in fewer passes over memory.

A module is fused where, on the very arguments that its model gives it, both ways agree: no table of
architectures is trusted. What has arguments that ours does not take (a mask, a cache, another
window) goes through the model's own code, call by call.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

Forward = Callable[..., Any]

FUSED = "eaft_fused"  # attribute of a module: our forward of it
_TOLERANCE = 0.02  # relative, of the output; a few roundings to eight bits
_WIDE = 512  # a norm's kernel has a program for each row, which narrow ones do not fill
# whose forward is projections, norms of q and k, rotation by halves, attention, projection
_ATTENTIONS = (
    "Dots1Attention",
    "Glm4MoeAttention",
    "GraniteMoeAttention",
    "MiniMaxM2Attention",
    "MixtralAttention",
    "PhimoeAttention",
    "Qwen2MoeAttention",
    "Qwen3MoeAttention",
    "Qwen3VLMoeTextAttention",
)
_BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]


@torch.inference_mode()
def fuse(model: Any, ids_BS: torch.Tensor) -> int:
    """Fuse what agrees with the model's own forward on tokens [B, S]; returns how many modules."""
    candidates = {module: ours for module in model.modules() if (ours := _ours(module))}
    agreed: dict[Any, bool] = {}

    def compare(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], theirs: Any) -> None:
        same = _agree(candidates[module](*args, **kwargs), theirs)
        agreed[module] = agreed.get(module, True) and same

    handles = [module.register_forward_hook(compare, with_kwargs=True) for module in candidates]
    try:
        model(input_ids=ids_BS, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    fused = [module for module, same in agreed.items() if same]
    for module in fused:
        module.forward = module.__dict__[FUSED] = candidates[module]
    return len(fused)


@contextmanager
def as_written(model: Any) -> Iterator[None]:
    """Within it every module runs as transformers wrote it."""
    fused = [module for module in model.modules() if FUSED in module.__dict__]
    for module in fused:
        del module.forward
    try:
        yield
    finally:
        for module in fused:
            module.forward = module.__dict__[FUSED]


def _agree(ours: Any, theirs: Any) -> bool:
    mine, own = (out[0] if isinstance(out, tuple) else out for out in (ours, theirs))
    gap = torch.linalg.vector_norm((mine - own).float())
    return bool(gap <= _TOLERANCE * torch.linalg.vector_norm(own.float()))


def _ours(module: Any) -> Forward | None:
    """Our forward of a module that looks as if it fitted."""
    if type(module).__name__ in _ATTENTIONS:
        return partial(_attention, module, module.forward)
    is_norm = type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon")
    if not is_norm or len(inspect.signature(module.forward).parameters) > 1:
        return None
    return partial(_norm, module) if len(module.weight) >= _WIDE else None


def _norm(module: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    from eaft_prune.engines.kernels.norm import add_norm_

    rows = hidden_states.reshape(-1, hidden_states.shape[-1])
    return add_norm_(rows, None, module.weight, module.variance_epsilon).view(hidden_states.shape)


def _attention(
    module: Any,
    own: Forward,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    attention_mask: torch.Tensor | None = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    from eaft_prune.engines.kernels.attention import rotate_

    batch, length, _ = hidden_states.shape
    cos, sin = position_embeddings
    window = getattr(module.config, "sliding_window", None)
    if (
        attention_mask is not None
        or past_key_values is not None
        or len(cos) > 1  # positions of their own for each block
        or (window is not None and window < length)
    ):
        out: tuple[torch.Tensor, None] = own(
            hidden_states=hidden_states,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )
        return out
    turned: list[torch.Tensor] = []
    for name in ("q", "k"):
        x: torch.Tensor = getattr(module, f"{name}_proj")(hidden_states)
        norm = getattr(module, f"{name}_norm", None)
        if norm is not None and len(norm.weight) > module.head_dim:  # of all heads at once
            x, norm = norm(x), None
        by = None if norm is None else (norm.weight, norm.variance_epsilon)
        x = x.view(batch, length, -1, module.head_dim)
        turned.append(rotate_(x, cos[0], sin[0], cos.shape[-1] // 2, by).transpose(1, 2))
    value = module.v_proj(hidden_states).view(batch, length, -1, module.head_dim).transpose(1, 2)
    query, key = turned
    grouped = query.shape[1] > value.shape[1]
    with sdpa_kernel(_BACKENDS, set_priority=True):
        seen = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=module.scaling, enable_gqa=grouped
        )
    return module.o_proj(seen.transpose(1, 2).reshape(batch, length, -1)), None
