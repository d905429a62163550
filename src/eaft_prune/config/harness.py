"""Settings of the tasks of lm-evaluation-harness that base and candidate are given."""

from __future__ import annotations

from eaft_prune.config.base import NonNegative, Positive, Settings


class HarnessSettings(Settings):
    """How the tasks of eval.tasks are asked."""

    include: str | None = None
    """a folder of tasks of your own, YAML files; other names are the harness's"""
    limit: Positive | None = None
    """samples of each task, the first ones; null: all"""
    num_fewshot: NonNegative | None = None
    """examples before each question; null: as the task says"""
    chat_template: bool = False
    """put prompts into the checkpoint's chat template; what is judged is then the final message"""
    batch: Positive = 32
    """requests asked at once: part of what is measured, as padding moves last bits"""
    max_new_tokens: Positive = 256
    """where writing is cut off, if the task does not say"""
    seed: NonNegative = 0
    """of tasks that sample; both models are given the same noise"""
