"""What a model runs on, in words."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch

from eaft_prune.config import RuntimeSettings
from eaft_prune.engines.loading import resolve_device, resolve_dtype

_CPUINFO = Path("/proc/cpuinfo")


def describe(runtime: RuntimeSettings) -> dict[str, Any]:
    """Device, precision and threads that these settings mean on this machine."""
    device = resolve_device(runtime)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "device": device.type,
        "gpu": gpu,
        "cpu": _cpu_model(),
        "dtype": resolve_dtype(runtime),
        "threads": runtime.threads or torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _cpu_model() -> str:
    if _CPUINFO.exists():  # Linux; elsewhere the standard library knows
        for line in _CPUINFO.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"
