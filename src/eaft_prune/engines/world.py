"""What can be known of processes and devices without importing torch."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

from eaft_prune.config import RuntimeSettings


class RankLost(Exception):
    """A process that shares the work is gone; which one has been said on stderr already."""


def world_size() -> int:
    """Number of processes that torchrun started; 1 without it."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def is_helper() -> bool:
    """Whether this process is one that serves rank 0."""
    return world_size() > 1 and os.environ["RANK"] != "0"


def built_for_gpus() -> bool:
    """Whether the installed torch could find a GPU; importing it to ask takes two seconds."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    libraries = Path(spec.origin).parent / "lib"
    return any(libraries.glob("*torch_cuda*")) or any(libraries.glob("*torch_hip*"))


def is_cpu(runtime: RuntimeSettings) -> bool:
    """Whether a model runs on the CPU for certain; where not, torch has to be asked."""
    return runtime.device == "cpu" or (runtime.device == "auto" and not built_for_gpus())
