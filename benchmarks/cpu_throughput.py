"""Tokens per second of our engine against transformers eager, on the shipped demo model.

    python benchmarks/cpu_throughput.py [--path DIR] [--blocks 16] [--seq-len 1024] [--repeats 3]

Both run the same checkpoint, dtype and blocks; the median of the repeats is printed, with the share
of the machine's own float32 matmul rate.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from eaft_prune.checkpoints.families import family_of
from eaft_prune.checkpoints.read import open_model
from eaft_prune.config import ModelSettings, RuntimeSettings
from eaft_prune.core.types import Blocks
from eaft_prune.engines.loading import load_engine
from eaft_prune.packs.sources import model_path


def random_blocks(count: int, seq_len: int, vocab: int) -> Blocks:
    """Random tokens, two thirds of them scored."""
    rng = np.random.default_rng(0)
    scored = rng.random((count, seq_len)) < 2 / 3
    scored[:, 0] = False
    ids = rng.integers(0, vocab, (count, seq_len)).astype(np.int32)
    rows = np.zeros_like(ids)
    return Blocks("random", seq_len, ids, scored, rows, np.zeros(1, np.int32), ("random",), "")


def median_seconds(run: Callable[[], object], repeats: int) -> float:
    """Median wall time after one warm-up."""
    run()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def eager(path: Path, blocks: Blocks) -> Callable[[], object]:
    """transformers as it comes: eager attention and experts, logits at every position."""
    from transformers import AutoModelForCausalLM, Mxfp4Config

    model = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=torch.float32,
        quantization_config=Mxfp4Config(dequantize=True),
        attn_implementation="eager",
        experts_implementation="eager",
    ).eval()

    @torch.inference_mode()
    def run() -> None:
        for row in torch.from_numpy(blocks.ids_BS).long():
            logp = torch.log_softmax(model(row[None]).logits.float(), dim=-1)
            logp[0, :-1].gather(1, row[1:, None])

    return run


def active_flops_per_token(config: dict[str, int], seq_len: int, scored: float) -> float:
    """2 x the multiply-adds a token needs, causal attention and scored logits only."""
    h, q = config["hidden_size"], config["num_attention_heads"] * config["head_dim"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    expert = 3 * h * config["intermediate_size"]
    per_layer = h * (2 * q + 2 * kv) + config["num_experts_per_tok"] * expert
    window = config.get("sliding_window") or seq_len
    attended = (seq_len / 2 + min(window, seq_len / 2)) / 2
    per_layer += h * config["num_local_experts"] + 2 * q * attended
    return 2 * (config["num_hidden_layers"] * per_layer + scored * h * config["vocab_size"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--path", default="demo:checkpoint")
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    files = open_model(model_path(ModelSettings(name="bench", path=options.path)))
    runtime = RuntimeSettings(store_dir="", checkpoint_dir="", device="cpu", dtype="float32")
    engine = load_engine(files, family_of(files.config), runtime, 20)
    blocks = random_blocks(options.blocks, options.seq_len, files.config["vocab_size"])
    a, b = torch.randn(4096, 4096), torch.randn(4096, 4096)
    ceiling = 2 * 4096**3 / median_seconds(lambda: a @ b, 3)
    flops = active_flops_per_token(dict(files.config), options.seq_len, 2 / 3)
    runs = {
        "transformers eager": eager(files.path, blocks),
        "ours, evaluate": lambda: engine.score(blocks, lambda done: None),
        "ours, profile": lambda: engine.trace(blocks, lambda done: None),
    }
    print(f"{torch.get_num_threads()} threads, float32 matmul {ceiling / 1e9:.0f} GFLOP/s")
    print(f"{'run':<20} {'tok/s':>9} {'share of matmul':>16} {'x eager':>8}")
    tokens = blocks.ids_BS.size
    reference = None
    for name, run in runs.items():
        rate = tokens / median_seconds(run, options.repeats)
        reference = reference or rate
        print(f"{name:<20} {rate:>9.0f} {rate * flops / ceiling:>15.1%} {rate / reference:>8.2f}")


if __name__ == "__main__":
    main()
