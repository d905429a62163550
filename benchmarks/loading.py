"""A checkpoint on disk, loaded and evaluated within limits of memory.

    python benchmarks/loading.py --path CHECKPOINT [--limits 24 16] [--device cuda]
        [--blocks 16] [--seq-len 2048] [--batch-tokens 8192]

Without a limit first; with each limit the token scores must be the same to the last bit. On a GPU
a limit streams layers, on the CPU it leaves the experts packed.
"""

from __future__ import annotations

import argparse
import gc
import logging
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from common import device_of, forget_peak, name_of, peak_gb, random_blocks, untold, wait
from common import options as engine_options

from eaft_prune.checkpoints.read import open_model
from eaft_prune.config import RuntimeSettings
from eaft_prune.engines.loading import load_files


def main(arguments: Sequence[str] | None = None) -> list[tuple[float, bool]]:
    """Tokens per second without a limit and with each, and whether scores were those without."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--path", type=Path, required=True)
    parser.add_argument("--limits", type=float, nargs="*", default=[24.0, 16.0], metavar="GB")
    parser.add_argument("--device", type=device_of, default="cuda")
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--batch-tokens", type=int, default=8192)
    options = parser.parse_args(arguments)
    device: torch.device = options.device
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    files = open_model(options.path)
    blocks = random_blocks(options.blocks, options.seq_len, files.config["vocab_size"])
    exact, found = None, []
    print(f"{name_of(device)}, {files.weight_bytes / 1e9:.2f} GB on disk")
    for limit in (None, *options.limits):
        runtime = RuntimeSettings(
            device=str(device), batch_tokens=options.batch_tokens, memory_gb=limit,
            store_dir="", checkpoint_dir="",
        )  # fmt: skip
        forget_peak(device)
        started = time.perf_counter()
        engine = load_files(files, engine_options(runtime))
        wait(device)
        loaded = time.perf_counter() - started
        engine.score(blocks, untold)  # kernels are compiled
        started = time.perf_counter()
        scores = engine.score(blocks, untold)
        rate = blocks.ids_BS.size / (time.perf_counter() - started)
        exact = exact or scores
        found.append((rate, np.array_equal(scores.logp_T, exact.logp_T)))
        print(
            f"limit {limit} GB: loaded in {loaded:.1f} s, {rate:.0f} tok/s in batches of "
            f"{options.batch_tokens}, peak {peak_gb(device):.1f} GB, equal: {found[-1][1]}",
            flush=True,
        )
        del engine
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return found


if __name__ == "__main__":
    main()
