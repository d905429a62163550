"""A loaded model run our way against the same model run as transformers runs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from eaft_prune.core.types import UserError
from eaft_prune.engines import attention, experts
from eaft_prune.engines.fused_layers import as_written

_TOKENS = 64
_SEED = 0
# mean distance of the two distributions of a position, half the sum of |d p|: what the order of
# sums leaves. In sixteen bits another order can choose another expert, and much follows from it.
_LIMITS = {"float32": 1e-4, "bfloat16": 0.1, "float16": 0.1}


def made_up_tokens(model: Any) -> torch.Tensor:
    """Token ids [1, S], the same at every call, where the model is."""
    text = model.config.get_text_config()
    generator = torch.Generator().manual_seed(_SEED)
    ids = torch.randint(text.vocab_size, (1, _TOKENS), generator=generator)
    return ids.to(next(model.parameters()).device)


@torch.inference_mode()
def check_against_plain(
    model: Any, ours: Callable[[torch.Tensor], torch.Tensor], dtype: str
) -> float:
    """Mean distance between both on made-up tokens, whose logits `ours` gives; [1, S] -> [S, V].

    The distance is total variation, in [0, 1].

    Raises UserError where they differ by more than rounding, so that no architecture that our
    experts, attention or head do not fit is silently wrong.
    """
    ids = made_up_tokens(model)
    mine = ours(ids).float().softmax(-1)
    chosen = model.config._attn_implementation
    try:
        model.set_experts_implementation("eager")
        if chosen == attention.NAME:
            model.set_attn_implementation("eager")
        with as_written(model):
            logits = model(input_ids=ids, use_cache=False).logits[0]
    finally:
        model.set_experts_implementation(experts.NAME)
        if chosen == attention.NAME:
            model.set_attn_implementation(chosen)
    gap = float((mine - logits.float().softmax(-1)).abs().sum(-1).mean() / 2)
    if not gap <= _LIMITS[dtype]:
        raise UserError(
            f"a {model.config.model_type} model gives other probabilities here than in "
            f"transformers: they are {gap:.2g} apart (total variation, mean of {_TOKENS} tokens) "
            f"in {dtype}, where at most {_LIMITS[dtype]:g} is rounding; this architecture cannot "
            "be pruned yet"
        )
    return gap
