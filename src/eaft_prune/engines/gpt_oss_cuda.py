"""gpt-oss's layers on CUDA in bfloat16: its own modules' weights, our kernels around the matmuls.

The arithmetic is that of transformers' model code, with fewer roundings: norms, rotations, router
weights and sums are made in float32 and rounded once.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch

from eaft_prune.engines.kernels.attention import flash_attention, rotate_
from eaft_prune.engines.kernels.norm import add_norm_


def hidden_states(model: Any, ids_BS: torch.Tensor) -> torch.Tensor:
    """The normed output of the last layer, [B * S, H]."""
    inner = model.base_model
    batch, length = ids_BS.shape
    x_NH = inner.embed_tokens(ids_BS).view(batch * length, -1)
    positions = torch.arange(length, device=ids_BS.device)[None]
    cos, sin = (table[0].contiguous() for table in inner.rotary_emb(x_NH, positions))
    delta_NH: torch.Tensor | None = None
    for layer in inner.layers:
        home = layer.input_layernorm.weight.device  # layers may lie on several GPUs
        x_NH, cos, sin = x_NH.to(home), cos.to(home), sin.to(home)
        delta_NH = None if delta_NH is None else delta_NH.to(home)
        with torch.cuda.device(home) if home.type == "cuda" else nullcontext():
            normed = _add_norm(layer.input_layernorm, x_NH, delta_NH)
            delta_NH = _attention(layer.self_attn, normed, cos, sin, batch)
            normed = _add_norm(layer.post_attention_layernorm, x_NH, delta_NH)
            _, gates_NK, ids_NK = layer.mlp.router(normed)
            delta_NH = layer.mlp.experts(normed, ids_NK, gates_NK)
    assert delta_NH is not None, "a model has layers"
    last = inner.norm.weight.device
    return _add_norm(inner.norm, x_NH.to(last), delta_NH.to(last))


def _add_norm(norm: Any, x_NH: torch.Tensor, delta_NH: torch.Tensor | None) -> torch.Tensor:
    return add_norm_(x_NH, delta_NH, norm.weight, norm.variance_epsilon)


def _attention(
    module: Any, normed_NH: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, batch: int
) -> torch.Tensor:
    def heads(projection: torch.nn.Module) -> torch.Tensor:
        out: torch.Tensor = projection(normed_NH)
        return out.view(batch, len(cos), -1, module.head_dim)

    query = rotate_(heads(module.q_proj), cos, sin)
    key = rotate_(heads(module.k_proj), cos, sin)
    value = heads(module.v_proj)
    out = flash_attention(query, key, value, module.sinks, module.scaling, module.sliding_window)
    projected: torch.Tensor = module.o_proj(out.view(len(normed_NH), -1))
    return projected
