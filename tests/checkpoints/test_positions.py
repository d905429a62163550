"""Positions of a model, as published configs give them."""

from __future__ import annotations

from typing import Any

import pytest

from eaft_prune.checkpoints.positions import max_positions

GPT_OSS = {
    "max_position_embeddings": 131072,
    "rope_scaling": {
        "rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096,
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "most"),
    [
        (GPT_OSS, 131072),
        ({"max_position_embeddings": 40960, "rope_scaling": None}, 40960),  # Qwen3
        (  # Qwen3 with YaRN, as its card says
            {
                "max_position_embeddings": 40960,
                "rope_scaling": {
                    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768,
                },
            },
            131072,
        ),
        (  # Llama 3.1: given as scaled
            {
                "max_position_embeddings": 131072,
                "rope_scaling": {
                    "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192,
                },
            },
            131072,
        ),
        (
            {"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 2.0}},
            8192,
        ),
        (
            {
                "max_position_embeddings": 4096,
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            },
            4096,
        ),
        ({}, None),
    ],
)  # fmt: skip
def test_positions_are_those_after_scaling(config: dict[str, Any], most: int | None) -> None:
    assert max_positions(config) == most
