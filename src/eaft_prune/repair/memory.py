"""What repair needs of a device's memory, found out before the first layer."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from eaft_prune.core.types import Blocks, KeepPlan, UserError
from eaft_prune.engines import experts as moe
from eaft_prune.engines.transformers import TransformersEngine
from eaft_prune.repair.layer import Level
from eaft_prune.repair.least_squares import exact

log = logging.getLogger(__name__)

HOST = torch.device("cpu")


@dataclass(frozen=True)
class Sizes:
    """Numbers that memory depends on."""

    positions: int
    scored: int
    top_k: int
    experts: int  # that stay
    hidden: int
    inner: int
    width: int  # bytes of a number of the stream
    exact: int  # bytes of a number of a Gram matrix


def movable(sizes: Sizes, level: Level) -> int:
    """Bytes of what may lie in host memory: streams and what a token says of a layer."""
    streams = 4 * sizes.positions * sizes.hidden * sizes.width
    columns = 1 if level == "bias" else sizes.inner
    features = 1.5 * 4  # once whole and once by half
    slopes = 2 * sizes.width if level == "experts" else 0
    return streams + int(max(features, slopes) * sizes.scored * sizes.top_k * columns)


def fixed(sizes: Sizes, level: Level) -> int:
    """Bytes of what must lie on the device: experts, targets, Gram matrices and solutions."""
    hidden, inner, count = sizes.hidden, sizes.inner, sizes.experts
    experts = 3 * count * 3 * inner * hidden * 4  # as they are, as they become, as they are tried
    targets = 6 * sizes.scored * hidden * 4
    side = {"bias": 1, "down_proj": inner, "experts": max(inner, hidden)}[level]
    grams = count * side**2 * (3 * sizes.exact + 4)
    outputs = 2 * inner if level == "experts" else hidden
    solutions = 6 * count * side * outputs * 4
    one = 3 * (sizes.scored * sizes.top_k // max(1, count)) * (3 * inner + hidden) * 4
    return experts + targets + grams + solutions + one


def sizes_of(engine: TransformersEngine, layout: KeepPlan, blocks: Blocks) -> Sizes:
    """Of a model, the experts that a checkpoint holds of it, and what is calibrated on."""
    weight = engine.model.get_input_embeddings().weight
    module: Any = engine.family.experts(engine.model)[0]
    return Sizes(
        positions=blocks.ids_BS.size,
        scored=blocks.scored_tokens,
        top_k=engine.top_k,
        experts=max(len(ids) for ids in layout.kept),
        hidden=weight.shape[1],
        inner=moe.weight(module, "down_proj", 0).shape[0],
        width=weight.element_size(),
        exact=exact(engine.device).itemsize,
    )


def place(
    device: torch.device, sizes: Sizes, level: Level, free: int, free_host: int
) -> torch.device:
    """Where streams and features lie: on the device if it holds them, else in host memory.

    Raises UserError where neither has room.
    """
    needs, moves = fixed(sizes, level), movable(sizes, level)
    log.info("repair: %.1f GB, and %.1f GB that may lie in host memory", needs / 1e9, moves / 1e9)
    if needs + moves <= free:
        return device
    if device != HOST and needs <= free and moves <= free_host:
        log.info("streams and features lie in host memory: %.1f GB are free", free / 1e9)
        return HOST
    raise UserError(
        f"pruning.compensation = {level!r} needs about {needs / 1e9:.2f} GB of memory and "
        f"{moves / 1e9:.2f} GB that may lie in host memory; {free / 1e9:.2f} GB are free: lower "
        "compensation.num_blocks, or use pruning.compensation=down_proj or bias"
    )


def place_of(
    engine: TransformersEngine, layout: KeepPlan, blocks: Blocks, level: Level
) -> torch.device:
    """`place` on this machine as it is now."""
    sizes = sizes_of(engine, layout, blocks)
    return place(engine.device, sizes, level, _free(engine.device), _free(HOST))


def _free(device: torch.device) -> int:
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0] + unused)
