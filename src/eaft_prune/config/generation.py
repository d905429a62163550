"""Settings of what the models are made to write."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from eaft_prune.config.base import NonNegative, Positive, Settings


class GenerationSettings(Settings):
    """What base and candidate are made to write with eval.generation=true."""

    prompts: Positive = 64
    """conversations of each pack, cut before an assistant's turn"""
    max_prompt_tokens: Positive = 512
    """the last turn that begins within so many tokens is the one to write"""
    max_new_tokens: Positive = 256
    """where writing is cut off"""
    batch: Positive = 16
    """prompts written at once: part of what is measured, as padding moves last bits"""
    seeds: tuple[NonNegative, ...] = ()
    """of sampling, once each, beside greedy; both models are given the same noise"""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """of sampling"""
