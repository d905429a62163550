"""Whether torchrun started this process, and as which of how many."""

from __future__ import annotations

import os


def world_size() -> int:
    """Number of processes that torchrun started; 1 without it."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def is_helper() -> bool:
    """Whether this process is one that serves rank 0."""
    return world_size() > 1 and os.environ["RANK"] != "0"
