"""Tokens per second of our engine against transformers eager, on the shipped demo model.

    python benchmarks/cpu_throughput.py [--path DIR] [--blocks 16] [--seq-len 1024] [--repeats 3]
        [--matmul 4096]

Both run the same checkpoint, dtype and blocks; the median of the repeats is printed, with the share
of the machine's own float32 matmul rate, and how far the two ways' ln p lie apart.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from common import flops_per_token, matmul_rate, random_blocks, seconds, untold
from common import options as engine_options

from eaft_prune.checkpoints.read import open_model
from eaft_prune.config import ModelSettings, RuntimeSettings
from eaft_prune.core.types import Blocks
from eaft_prune.engines.loading import load_files
from eaft_prune.packs.sources import model_path


def eager(path: Path, blocks: Blocks) -> Callable[[], torch.Tensor]:
    """transformers as it comes: eager attention and experts, logits at every position."""
    from transformers import AutoModelForCausalLM, Mxfp4Config

    model = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=torch.float32,
        trust_remote_code=False,
        quantization_config=Mxfp4Config(dequantize=True),
        attn_implementation="eager",
        experts_implementation="eager",
    ).eval()

    @torch.inference_mode()
    def run() -> torch.Tensor:
        """ln p of every token but each block's first, [B, S - 1]."""
        found = []
        for row in torch.from_numpy(blocks.ids_BS).long():
            logp = torch.log_softmax(model(row[None]).logits.float(), dim=-1)
            found.append(logp[0, :-1].gather(1, row[1:, None])[:, 0])
        return torch.stack(found)

    return run


def main(arguments: Sequence[str] | None = None) -> tuple[dict[str, float], float]:
    """Tokens per second of each way, and the largest difference of ln p."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--path", default="demo:checkpoint")
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--matmul", type=int, default=4096, help="rows of the matrices")
    options = parser.parse_args(arguments)
    files = open_model(model_path(ModelSettings(name="bench", path=options.path)))
    runtime = RuntimeSettings(store_dir="", checkpoint_dir="", device="cpu", dtype="float32")
    engine = load_files(files, engine_options(runtime))
    blocks = random_blocks(options.blocks, options.seq_len, files.config["vocab_size"])
    ceiling = matmul_rate(options.matmul, torch.float32)
    flops = flops_per_token(files.config, options.seq_len, 2 / 3)
    reference = eager(files.path, blocks)
    runs: dict[str, Callable[[], object]] = {
        "transformers eager": reference,
        "ours, evaluate": lambda: engine.score(blocks, untold),
        "ours, profile": lambda: engine.trace(blocks, untold),
    }
    print(f"{torch.get_num_threads()} threads, float32 matmul {ceiling / 1e9:.0f} GFLOP/s")
    print(f"{'run':<20} {'tok/s':>9} {'share of matmul':>16} {'x eager':>8}")
    rates: dict[str, float] = {}
    for name, run in runs.items():
        rate = rates[name] = blocks.ids_BS.size / seconds(run, options.repeats)
        faster = rate / rates["transformers eager"]
        print(f"{name:<20} {rate:>9.0f} {rate * flops / ceiling:>15.1%} {faster:>8.2f}")
    theirs = reference().numpy()[blocks.scored_BS[:, 1:]]
    apart = float(np.abs(engine.score(blocks, untold).logp_T - theirs).max())
    print(f"ln p of the two differ by at most {apart:.1e}")
    return rates, apart


if __name__ == "__main__":
    main()
