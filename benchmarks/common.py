"""What benchmarks share: random blocks, timing, FLOPs; no Hydra, which GPU machines may lack."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from eaft_prune.config import EngineSettings, RuntimeSettings
from eaft_prune.core.types import Blocks
from eaft_prune.engines.base import EngineOptions

CPU = torch.device("cpu")


def random_blocks(count: int, seq_len: int, vocab: int, share: float = 2 / 3) -> Blocks:
    """Random ids, a random share of the positions scored; of none, the last of each block."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, vocab, (count, seq_len)).astype(np.int32)
    scored = rng.random((count, seq_len)) < share
    scored[:, 0] = False
    if not share:
        scored[:, -1] = True
    rows = np.zeros_like(ids)
    return Blocks("random", seq_len, ids, scored, rows, np.zeros(1, np.int32), ("random",), "")


def untold(tokens: int) -> None:
    """Progress that nobody watches."""


def seconds(run: Callable[[], object], repeats: int = 3, device: torch.device = CPU) -> float:
    """Median wall time after a warm-up, the device idle at both ends."""
    run()
    times = []
    for _ in range(repeats):
        wait(device)
        started = time.perf_counter()
        run()
        wait(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def device_of(text: str) -> torch.device:
    """A device with its number: tensors on `cuda` say that they are on `cuda:0`."""
    device = torch.device(text)
    return torch.device("cuda", 0) if device == torch.device("cuda") else device


def wait(device: torch.device) -> None:
    """Until the device has done what it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def forget_peak(device: torch.device) -> None:
    """`peak_gb` counts from here; on the CPU it cannot forget."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_gb(device: torch.device) -> float:
    """Most memory held: of the GPU by tensors, on the CPU by the process since its start."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def name_of(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def matmul_rate(size: int, dtype: torch.dtype, device: torch.device = CPU) -> float:
    """FLOP/s of a product of random square matrices."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times = 20 if device.type == "cuda" else 1
    spent = seconds(lambda: [a @ b for _ in range(times)], 3, device)
    return times * 2 * size**3 / spent


def flops_per_token(config: Mapping[str, Any], seq_len: int, scored: float) -> float:
    """2 x the multiply-adds a token needs.

    Projections, chosen experts, router, causally attended keys, the head for the share of scored
    positions.
    """
    h, q = config["hidden_size"], config["num_attention_heads"] * config["head_dim"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    expert = 3 * h * config["intermediate_size"]
    window = config.get("sliding_window") or seq_len
    attended = (seq_len / 2 + min(window, seq_len / 2)) / 2
    layer = h * (2 * q + 2 * kv) + config["num_experts_per_tok"] * expert
    layer += h * config["num_local_experts"] + 2 * q * attended
    head = scored * h * config["vocab_size"]
    return float(2 * (config["num_hidden_layers"] * layer + head))


def options(runtime: RuntimeSettings) -> EngineOptions:
    """What transformers is opened with."""
    return EngineOptions(EngineSettings(name="transformers"), runtime, 20)
