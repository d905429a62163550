"""Writing on with transformers' own model and KV cache, our experts in it, prompts in step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from eaft_prune.core.generation import Decoding, ended_at
from eaft_prune.engines.base import OnTokens


@torch.inference_mode()
def generate(
    model: Any, prompts: Sequence[Sequence[int]], how: Decoding, first: int, on_tokens: OnTokens
) -> tuple[list[list[int]], list[bool]]:
    """What follows each prompt, and whether it ended by itself; prompt i is number first + i.

    Prompts are padded on the left and masked. A stop of one token ends what was written, a longer
    one is no part of it. on_tokens hears of max_new_tokens a prompt, written or not.
    """
    device = next(model.parameters()).device
    width = max(map(len, prompts))
    ids = torch.zeros((len(prompts), width), dtype=torch.long, device=device)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt, device=device)
        mask[row, width - len(prompt) :] = 1
    noise = None if how.seed is None else noise_of(how.seed, first, len(prompts), device)
    written: list[list[int]] = [[] for _ in prompts]
    ended = [False] * len(prompts)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache, done = None, 0
    with _with_cache(model):
        while done < how.max_new_tokens and not all(ended):
            out = model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = out.past_key_values
            chosen = choose(out.logits[:, -1].float(), how.temperature, noise)
            for row, token in enumerate(chosen.tolist()):
                if not ended[row]:
                    written[row].append(token)
                    ended[row] = _stopped(written[row], how.stops)
            ids, positions = chosen[:, None], positions[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones((len(prompts), 1))], dim=1)
            done += 1
            on_tokens(len(prompts))
    on_tokens(len(prompts) * (how.max_new_tokens - done))
    return [some[: ended_at(some, how.stops)] for some in written], ended


@contextmanager
def _with_cache(model: Any) -> Iterator[None]:
    """transformers' eager attention inside: ours takes whole blocks, no cache and no padding."""
    ours = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(ours)


def noise_of(seed: int, first: int, count: int, device: torch.device) -> list[torch.Generator]:
    """The noise of prompts number first, first + 1, ... by a seed of sampling."""
    # one a prompt, so that what is drawn for it depends on neither batch nor model
    made = [torch.Generator(device=device) for _ in range(count)]
    for number, generator in enumerate(made, first):
        generator.manual_seed((seed << 32) + number)
    return made


def choose(
    logits_BV: torch.Tensor, temperature: float, noise: list[torch.Generator] | None
) -> torch.Tensor:
    """The likeliest, or a draw by softmax(logits / temperature): the largest after Gumbel noise."""
    if noise is None:
        return logits_BV.argmax(-1)
    drawn = [
        torch.empty_like(row).exponential_(generator=generator)
        for row, generator in zip(logits_BV, noise, strict=True)
    ]
    return (logits_BV / temperature - torch.stack(drawn).log()).argmax(-1)


def _stopped(written: list[int], stops: tuple[tuple[int, ...], ...]) -> bool:
    return any(tuple(written[-len(stop) :]) == stop for stop in stops)
