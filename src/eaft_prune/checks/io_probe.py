"""What exporting costs on this disk, seen on one layer."""

from __future__ import annotations

import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from eaft_prune.checkpoints.cut import cut
from eaft_prune.checkpoints.families.base import Family
from eaft_prune.checkpoints.read import ModelFiles
from eaft_prune.checkpoints.slice import sliced_bytes, write_sliced
from eaft_prune.core.types import KeepPlan, UserError


def io_probe(
    family: Family,
    source: ModelFiles,
    keep_n: int,
    layer: int,
    folder: Path,
    max_shard_bytes: int,
    on_bytes: Callable[[int], None],
) -> dict[str, Any]:
    """Write one layer with its first `keep_n` experts as an export would, measure, remove it.

    Bytes are tensor data. The estimate for the model scales the seconds by the bytes an export of
    all layers writes. Raises UserError where there is no such layer.
    """
    config = source.config
    layers, n_experts = family.n_layers(config), family.n_experts(config)
    if not 0 <= layer < layers:
        raise UserError(f"probe.layer = {layer}: the model has layers 0..{layers - 1}")
    plan = KeepPlan((tuple(range(keep_n)),) * layers, n_experts)
    kept = cut(family, source, plan)
    kept_files, slices = kept.files, kept.slices
    here = f".layers.{family.layer_numbers(config)[layer]}."
    mine = [name for name in kept_files.tensors if here in name]
    part = replace(kept_files, tensors={name: kept_files.tensors[name] for name in mine})
    folder.mkdir(parents=True, exist_ok=True)
    target = Path(tempfile.mkdtemp(prefix=".probe-", dir=folder))
    before = _peak_rss()
    try:
        started = time.perf_counter()
        written = write_sliced(
            part, {name: slices[name] for name in mine}, target, max_shard_bytes, on_bytes
        )
        seconds = time.perf_counter() - started
    finally:
        shutil.rmtree(target)

    whole = sum(sliced_bytes(kept_files.tensors[name], part) for name, part in slices.items())
    return {
        "layer": layer,
        "layer_bytes": sum(e.nbytes for name, e in source.tensors.items() if here in name),
        "bytes_read": written.tensor_bytes,
        "bytes_written": written.tensor_bytes,
        "shards_touched": len({entry.file for entry in part.tensors.values()}),
        "seconds": round(seconds, 4),
        "gb_per_s": round(written.tensor_bytes / 1e9 / seconds, 3),
        "peak_rss_bytes": _peak_rss(),
        "peak_rss_growth_bytes": _peak_rss() - before,
        "model_bytes_written": whole,
        "model_seconds_estimate": round(seconds * whole / written.tensor_bytes, 2),
    }


def _peak_rss() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
