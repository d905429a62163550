"""Causal attention with sinks, without masks or [S x S] score matrices.

softmax over (scores, sink) = softmax(scores) * sigmoid(logsumexp(scores) - sink), so a fused kernel
that returns the logsumexp needs to know nothing of sinks. Sliding windows run as a batch of local
blocks: chunk i of W queries sees the 2W keys of chunks i-1 and i.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

NAME = "eaft_sink_attention"


def sink_attention(  # noqa: PLR0913  transformers calls it so
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    sliding_window: int | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of query [B, H, S, D] to key, value [B, G, S, D]; returns [B, S, H, D].

    Blocks are dense, so there is no padding: a mask given by the caller is an error.
    """
    if attention_mask is not None:
        raise ValueError("sink_attention takes no mask: blocks are dense and causal")
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key = key.repeat_interleave(groups, dim=1)
        value = value.repeat_interleave(groups, dim=1)
    length = query.shape[2]
    if sliding_window is None or sliding_window >= length:
        out, lse = _fused(query, key, value, scaling, mask=None)
    else:
        out, lse = _windowed(query, key, value, scaling, sliding_window)
    if s_aux is not None:
        keep = torch.sigmoid(lse.float() - s_aux.float()[None, :, None])
        out = out * keep.to(out.dtype)[..., None]
    return out.transpose(1, 2).contiguous(), None


def _windowed(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, window: int
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, heads, length, dim = query.shape
    chunks = -(-length // window)
    tail = chunks * window - length
    query = F.pad(query, (0, 0, 0, tail)).view(batch, heads, chunks, window, dim)
    query = query.transpose(1, 2).reshape(batch * chunks, heads, window, dim)

    def spans(x: torch.Tensor) -> torch.Tensor:
        x = F.pad(x, (0, 0, window, tail)).unfold(2, 2 * window, window)
        return x.permute(0, 2, 1, 4, 3).reshape(batch * chunks, heads, 2 * window, dim)

    offset = torch.arange(window, device=query.device)[:, None]
    position = torch.arange(2 * window, device=query.device)[None, :] - window
    seen = (position <= offset) & (position > offset - window)
    seen = seen.expand(chunks, window, 2 * window).clone()
    seen[0, :, :window] = False  # before the first chunk there is only padding
    bias = torch.zeros(seen.shape, dtype=query.dtype, device=query.device)
    bias = bias.masked_fill_(~seen, float("-inf")).repeat(batch, 1, 1)[:, None]
    out, lse = _fused(query, spans(key), spans(value), scaling, bias)
    out = out.view(batch, chunks, heads, window, dim).transpose(1, 2)
    lse = lse.view(batch, chunks, heads, window).transpose(1, 2)
    return (
        out.reshape(batch, heads, chunks * window, dim)[:, :, :length],
        lse.reshape(batch, heads, chunks * window)[:, :, :length],
    )


def _fused(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    causal = mask is None
    aten = torch.ops.aten
    if query.device.type == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, attn_mask=mask, scale=scaling
        )
    elif causal and query.dtype != torch.float32:
        out, lse = aten._scaled_dot_product_flash_attention(
            query, key, value, 0.0, True, False, scale=scaling
        )[:2]
    else:
        bias = None if mask is None else mask.expand(-1, query.shape[1], -1, -1)
        out, lse = aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, True, 0.0, causal, scale=scaling
        )[:2]
    return out, lse[..., : query.shape[2]]
