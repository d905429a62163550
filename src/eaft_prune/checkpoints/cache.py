"""How much memory the keys and values of a token take while a model writes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_BYTES = 2  # bfloat16, which servers keep them in unless told otherwise
_BOUNDED = ("sliding_attention", "chunked_attention", "linear_attention")


def bytes_a_token(language: Mapping[str, Any], layers: int) -> int | None:
    """Bytes that one more token of a long sequence takes, all layers together, in bfloat16.

    Layers whose memory is bounded (a window, a chunk, a state) grow no more. None: config.json does
    not say enough.
    """
    kinds = language.get("layer_types") or ["full_attention"] * layers
    growing = sum(kind not in _BOUNDED for kind in kinds)
    if rank := language.get("kv_lora_rank"):  # multi-head latent attention keeps one vector
        return growing * (int(rank) + int(language.get("qk_rope_head_dim") or 0)) * _BYTES
    heads = language.get("num_attention_heads")
    if not heads or not language.get("hidden_size"):
        return None
    width = language.get("head_dim") or language["hidden_size"] // heads
    return int(growing * 2 * (language.get("num_key_value_heads") or heads) * width * _BYTES)
