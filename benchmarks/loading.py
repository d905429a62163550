"""A checkpoint on disk, loaded and evaluated within limits of GPU memory.

    PYTHONPATH=src python benchmarks/loading.py --path CHECKPOINT [--limits 24 16]

Without a limit first; with each limit the token scores must be the same to the last bit.
"""

from __future__ import annotations

import argparse
import gc
import logging
import time
from pathlib import Path

import numpy as np
import torch
from random_model import random_blocks

from eaft_prune.checkpoints.families import family_of
from eaft_prune.checkpoints.read import open_model
from eaft_prune.config import RuntimeSettings
from eaft_prune.engines.loading import load_engine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--path", type=Path, required=True)
    parser.add_argument("--limits", type=float, nargs="*", default=[24.0, 16.0])
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    files = open_model(options.path)
    blocks = random_blocks(16, 2048, files.config["vocab_size"])
    exact = None
    print(f"{torch.cuda.get_device_name()}, {files.weight_bytes / 1e9:.2f} GB on disk")
    for limit in (None, *options.limits):
        runtime = RuntimeSettings(
            device="cuda", batch_tokens=8192, memory_gb=limit, store_dir="", checkpoint_dir=""
        )
        torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        engine = load_engine(files, family_of(files.config), runtime, 20)
        torch.cuda.synchronize()
        loaded = time.perf_counter() - started
        engine.score(blocks, lambda done: None)  # kernels are compiled
        started = time.perf_counter()
        scores = engine.score(blocks, lambda done: None)
        rate = blocks.ids_BS.size / (time.perf_counter() - started)
        exact = exact or scores
        same = np.array_equal(scores.logp_T, exact.logp_T)
        peak = torch.cuda.max_memory_allocated() / 1e9
        print(
            f"limit {limit} GB: loaded in {loaded:.1f} s, {rate:.0f} tok/s in batches of 8192, "
            f"peak {peak:.1f} GB, equal: {same}",
            flush=True,
        )
        del engine
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
