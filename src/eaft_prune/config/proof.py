"""Settings of tasks that check what earlier runs left."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from eaft_prune.config.base import Settings


class ReplaySettings(Settings):
    """A locked run to repeat, and what is elsewhere on this machine."""

    lock: str
    fresh: bool = True  # false: what the store has is read, not computed
    set: dict[str, Any] = Field(default_factory=dict)  # dotted key -> value, over the locked one


class VerifySettings(Settings):
    """An exported checkpoint to check against its manifest and its base."""

    path: str
    base: str | None = None  # null: where the manifest says the base was
    load: bool = True  # also load it with transformers and run it
