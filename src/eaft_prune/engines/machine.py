"""What a model runs on, in words."""

from __future__ import annotations

import platform
import sys
from pathlib import Path
from typing import Any

from eaft_prune.config import RuntimeSettings
from eaft_prune.engines.registry import dtype_of
from eaft_prune.engines.world import is_cpu

_CPUINFO = Path("/proc/cpuinfo")


def describe(runtime: RuntimeSettings) -> dict[str, Any]:
    """Device, precision and threads that these settings mean on this machine.

    threads is None where they are not set and nothing was computed in this process.
    """
    torch = sys.modules.get("torch")  # a run that finds everything in the store does without
    return {
        **({"device": "cpu", "gpu": None} if is_cpu(runtime) else _asked(runtime)),
        "cpu": _cpu_model(),
        "dtype": dtype_of(runtime),
        "threads": runtime.threads or (torch and torch.get_num_threads()),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _asked(runtime: RuntimeSettings) -> dict[str, Any]:
    import torch

    from eaft_prune.engines.loading import resolve_device

    device = resolve_device(runtime)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {"device": device.type, "gpu": gpu}


def _cpu_model() -> str:
    if _CPUINFO.exists():  # Linux; elsewhere the standard library knows
        for line in _CPUINFO.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"
