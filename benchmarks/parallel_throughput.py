"""Data parallel over the GPUs of one host, against one of them, at gpt-oss-20b's shape.

    PYTHONPATH=src torchrun --nproc-per-node=4 benchmarks/parallel_throughput.py [--model 20b]
        [--seq-len 2048] [--batch 16] [--device cuda]

Results must be equal to one GPU's to the last bit.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from common import random_blocks, seconds, untold
from random_model import engine_of, random_files, random_model

from eaft_prune.engines import parallel
from eaft_prune.engines.transformers import TransformersEngine


def load(model: str, batch_tokens: int, kind: str) -> TransformersEngine:
    """The same random model in every process."""
    files = random_files(model)
    index = torch.cuda.current_device() if kind == "cuda" else 0
    return engine_of(random_model(files, torch.device(kind, index)), files, batch_tokens)


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """On rank 0: how many times as fast as one process all of them score and trace."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("20b", "120b", "tiny"), default="20b")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=16, help="blocks a forward")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args(arguments)
    if os.environ["RANK"] != "0":
        raise SystemExit(parallel.serve(load))
    ranks = int(os.environ["WORLD_SIZE"])
    seq_len, batch = options.seq_len, options.batch
    vocab = random_files(options.model).config["vocab_size"]
    engine = parallel.load_everywhere(load, options.model, batch * seq_len, options.device)
    few = random_blocks(ranks * batch + 5, seq_len, vocab)
    one, all_ = engine.local.trace(few, untold), engine.trace(few, untold)
    for name in ("experts_TLK", "weights_TLK", "norms_TLK"):
        assert np.array_equal(getattr(one, name), getattr(all_, name)), name
    assert np.array_equal(one.scores.logp_T, all_.scores.logp_T)
    assert np.array_equal(one.scores.block_T, all_.scores.block_T)
    print(f"{len(few)} blocks: {ranks} processes equal one to the last bit, {len(one)} scored")
    many = random_blocks(ranks * batch * 4, seq_len, vocab)
    share = random_blocks(batch * 4, seq_len, vocab)
    found = {}
    for name in ("score", "trace"):  # results come back to the CPU: nothing is in flight
        alone = share.ids_BS.size / seconds(partial(getattr(engine.local, name), share, untold))
        rate = many.ids_BS.size / seconds(partial(getattr(engine, name), many, untold))
        found[name] = rate / alone
        print(f"{name}: one {alone:.0f} tok/s, {ranks} {rate:.0f}: {found[name]:.2f}x")
    parallel.stop()
    return found


if __name__ == "__main__":
    main()
