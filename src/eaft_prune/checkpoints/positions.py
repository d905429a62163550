"""How many positions a model knows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_SCALED = ("yarn", "linear", "dynamic", "longrope", "llama3")


def max_positions(config: Mapping[str, Any]) -> int | None:
    """The longest sequence that config.json speaks of, RoPE scaling included; None: of none.

    Some configs give max_position_embeddings as scaled (gpt-oss), some as it was before.
    """
    known = config.get("max_position_embeddings")
    if not isinstance(known, int):
        return None
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    factor = rope.get("factor")
    if rope.get("rope_type", rope.get("type")) not in _SCALED or not factor:
        return known
    return max(known, int(factor * rope.get("original_max_position_embeddings", known)))
