"""Our own pruning, for `peers.py`, in a process of its own.

    python benchmarks/peers_ours.py --started T --home DIR --keep-n N ... --methods NAME ...
        -- SETTING=VALUE ...

One trace of the profiling blocks serves all methods (those of `methods.py`) and sizes; each plan is
written as a checkpoint. Prints one line of JSON: a list with, of each, its seconds since T as if no
other had been asked for, CPU seconds, those of choosing, kept experts, checkpoint, most memory.
Cutting text into blocks counts nowhere: all others get their tokens cut.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from methods import METHODS
from numpy.typing import NDArray
from peers_floor import peak_gb
from runs import session
from runs import settings as checked

from eaft_prune.pipeline.criterion import select
from eaft_prune.pipeline.export import write
from eaft_prune.pipeline.requests import profiling
from eaft_prune.pipeline.traces import trace_of


def now() -> NDArray[np.float64]:
    """Clock, and CPU seconds of this process so far."""
    return np.array([time.time(), time.process_time()])


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Trace once, then choose and write each plan."""
    parser = argparse.ArgumentParser()
    parser.add_argument("settings", nargs="*")
    parser.add_argument("--started", type=float, required=True)
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--keep-n", type=int, nargs="+", required=True)
    parser.add_argument("--methods", nargs="+", choices=METHODS, required=True)
    asked = parser.parse_args(arguments)
    common = [*asked.settings, f"runtime.checkpoint_dir={asked.home / 'checkpoints'}"]
    first = checked(common)
    place = session(first, asked.home / "store")
    base = place.base()
    opened = now()
    place.blocks(base, profiling(first, first.profile.seed))
    cut = now() - opened
    place.profiler(base)
    loaded = now()
    trace_of(place, base)
    traced = now()
    start = np.array([asked.started, 0.0])
    found: list[dict[str, Any]] = []
    for method in asked.methods:
        for keep_n in asked.keep_n:
            how = checked([*METHODS[method], *common, f"pruning.keep_n={keep_n}"])
            begun = now()
            one = replace(place, experiment=how)
            selection = select(one, base)
            chosen = now()
            path = write(one, base, selection).files.path
            choosing = traced - loaded + chosen - begun
            seconds, cpu = traced - start - cut + now() - begun
            found.append(
                {
                    "method": method, "keep_n": keep_n, "kept": selection.plan.kept,
                    "path": str(path), "choosing": float(choosing[1]), "cpu": float(cpu),
                    "seconds": float(seconds),
                }
            )  # fmt: skip
    print(json.dumps([one | {"peak_gb": peak_gb()} for one in found]))
    return found


if __name__ == "__main__":
    main()
