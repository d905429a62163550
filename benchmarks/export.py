"""Time and memory of an export, against `cp` of the bytes it wrote on the same disk.

python benchmarks/export.py --path CHECKPOINT --out DIR [--keep-n 24]
"""

from __future__ import annotations

import argparse
import resource
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from eaft_prune.checkpoints.families import family_of
from eaft_prune.checkpoints.read import open_model
from eaft_prune.core.progress import Bars
from eaft_prune.core.types import KeepPlan
from eaft_prune.stages.export import Target, export


def main(arguments: Sequence[str] | None = None) -> int:
    """Bytes written."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--path", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--keep-n", type=int, default=24)
    options = parser.parse_args(arguments)
    files = open_model(options.path)
    family = family_of(files.config)
    family.table(files)
    layers, experts = family.n_layers(files.config), family.n_experts(files.config)
    rng = np.random.default_rng(0)
    kept = tuple(
        tuple(sorted(map(int, rng.permutation(experts)[: options.keep_n]))) for _ in range(layers)
    )
    target = options.out / "pruned"
    started = time.perf_counter()
    with Bars().bar("export", files.weight_bytes * options.keep_n // experts, "B") as on_bytes:
        where = Target(
            target, "benchmark", 5_000_000_000, {"base": {"label": "random", "digest": ""}}
        )
        done = export(family, files, KeepPlan(kept, experts), where, on_bytes)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    started = time.perf_counter()
    subprocess.run(["cp", "-r", target, options.out / "copy"], check=True)
    subprocess.run(["sync", "-f", options.out / "copy"], check=True)
    copy = time.perf_counter() - started
    shutil.rmtree(options.out / "copy")
    written = done.bytes_written / 1e9
    print(f"export {written:.2f} GB in {seconds:.1f} s ({written / seconds:.2f} GB/s)")
    print(f"cp of the same bytes with sync {copy:.1f} s; export / cp = {seconds / copy:.2f}")
    print(f"peak resident memory {peak:.2f} GB; digest {done.digest}")
    return done.bytes_written


if __name__ == "__main__":
    main()
