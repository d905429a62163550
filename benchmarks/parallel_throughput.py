"""Data parallel over the GPUs of one host, against one of them, at gpt-oss-20b's shape.

PYTHONPATH=src torchrun --nproc-per-node=4 benchmarks/parallel_throughput.py
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from random_model import engine_of, random_blocks, random_files, random_model

from eaft_prune.engines import parallel
from eaft_prune.engines.transformers import TransformersEngine

S = 2048
BATCH = 16  # blocks a forward


def load(layers: int) -> TransformersEngine:
    """The same random model in every process."""
    files = random_files("20b", layers)
    device = torch.device("cuda", torch.cuda.current_device())
    return engine_of(random_model(files, device), files, BATCH * S)


def seconds(run: Callable[[], object]) -> float:
    """Median of three after a warm-up; results come back to the CPU, so nothing is in flight."""
    run()
    times = []
    for _ in range(3):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def main() -> None:
    if os.environ["RANK"] != "0":
        raise SystemExit(parallel.serve(load))
    ranks = int(os.environ["WORLD_SIZE"])
    engine = parallel.load_everywhere(load, 24)
    few = random_blocks(ranks * BATCH + 5, S, 200000)
    one, all_ = engine.local.trace(few, _ignore), engine.trace(few, _ignore)
    for name in ("experts_TLK", "gates_TLK", "norms_TLK"):
        assert np.array_equal(getattr(one, name), getattr(all_, name)), name
    assert np.array_equal(one.scores.logp_T, all_.scores.logp_T)
    assert np.array_equal(one.scores.block_T, all_.scores.block_T)
    print(f"{len(few)} blocks: {ranks} GPUs equal one to the last bit, {len(one)} scored tokens")
    many = random_blocks(ranks * BATCH * 4, S, 200000)
    share = random_blocks(BATCH * 4, S, 200000)
    for name in ("score", "trace"):
        alone = share.ids_BS.size / seconds(lambda n=name: getattr(engine.local, n)(share, _ignore))
        rate = many.ids_BS.size / seconds(lambda n=name: getattr(engine, n)(many, _ignore))
        print(f"{name}: one GPU {alone:.0f} tok/s, {ranks} GPUs {rate:.0f}: {rate / alone:.2f}x")
    parallel.stop()


def _ignore(done: int) -> None:
    pass


if __name__ == "__main__":
    main()
