"""Settings of the decode benchmark."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from eaft_prune.config.base import NonNegative, Positive, Settings


class DecodeSettings(Settings):
    """Who decodes how much for task=decode_bench; `engine` says how checkpoints are served."""

    base: str | None = None
    """checkpoint directory or server URL; null: the model"""
    candidate: str | None = None
    """the same; null and no candidate_args: the base alone"""
    candidate_args: tuple[str, ...] = ()
    """of the launched candidate, after engine.args"""
    api: Literal["sglang", "openai"] = "sglang"
    """of servers: /generate or /v1/completions"""
    prompt_tokens: Positive = 256
    """tokens of each random prompt"""
    new_tokens: Annotated[tuple[Positive, ...], Field(min_length=1)] = (2048, 8192)
    """tokens decoded a prompt, one row of the table each"""
    batch_sizes: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1, 2, 4, 8, 16, 32, 64)
    """prompts decoded at once, one row of the table each"""
    repeats: Positive = 3
    """measurements of each row, base and candidate alternating"""
    warmup_tokens: Positive = 32
    """tokens decoded before the first measurement"""
    seed: NonNegative = 0
    """of the random prompts"""
