"""Tokens per second at the real shapes of gpt-oss with random MXFP4 experts, on one GPU.

    PYTHONPATH=src python benchmarks/gpu_throughput.py [--model 20b] [--part packed|streamed|peer]
        [--device cuda] [--shrink 1]

One run measures the ceilings (matmul, device copy), ours, and the peer's way on the same weights
(transformers: flex attention and grouped_mm). *layers* scores one token a block, so that the head
costs next to nothing. `share` is of the matmul ceiling, counted over active FLOPs: projections,
chosen experts, router, attended keys, the head where scored. --shrink divides lengths, batches and
the ceilings' sizes: `--model tiny --device cpu --shrink 64` tries this script.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from common import (
    device_of,
    flops_per_token,
    forget_peak,
    matmul_rate,
    name_of,
    peak_gb,
    random_blocks,
    seconds,
    untold,
)
from random_model import engine_of, random_files, random_model, unpack

from eaft_prune.checkpoints.read import ModelFiles
from eaft_prune.core.types import KeepPlan, Trace
from eaft_prune.engines.head import token_scores
from eaft_prune.engines.logits import PlainHead
from eaft_prune.engines.packed_model import weigh

SHARES = {"layers": 0.0, "2/3": 2 / 3, "all": 1.0}  # of the positions, that are scored


@dataclass(frozen=True)
class Rates:
    """What was measured on one device: a table's lines as they come, and what is asked of it."""

    files: ModelFiles
    device: torch.device
    shrink: int
    ceiling: float  # FLOP/s
    found: dict[str, float] = field(default_factory=dict)  # tokens per second by line

    @property
    def config(self) -> dict[str, Any]:
        return dict(self.files.config)

    def ours(
        self, model: Any, kind: str, seq_len: int, batch_tokens: int, names: Sequence[str]
    ) -> None:
        """A line for each of `layers`, `profile SHARE` and `evaluate SHARE`."""
        seq_len, batch_tokens = seq_len // self.shrink, batch_tokens // self.shrink
        engine = engine_of(model, self.files, batch_tokens)
        for name in names:
            share = SHARES[name.split()[-1]]
            count = max(1, 4 * batch_tokens // seq_len)
            blocks = random_blocks(count, seq_len, self.config["vocab_size"], share)
            run = engine.trace if name.startswith("profile") else engine.score
            flops = flops_per_token(self.config, seq_len, share)
            line = f"{kind}, S {seq_len}, batch {batch_tokens}: {name}"
            self.line(line, partial(run, blocks, untold), blocks.ids_BS.size, flops)

    def line(self, name: str, run: Callable[[], object], tokens: int, flops: float) -> None:
        forget_peak(self.device)
        rate = self.found[name] = tokens / seconds(run, device=self.device)
        share = rate * flops / self.ceiling
        print(f"{name:<44} {rate:>8.0f} {share:>6.1%} {peak_gb(self.device):>8.1f}", flush=True)


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Tokens per second of every line."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("20b", "120b", "tiny"), default="20b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--part", choices=("packed", "streamed", "peer"), default="packed")
    parser.add_argument("--device", type=device_of, default="cuda")
    parser.add_argument("--shrink", type=int, default=1)
    options = parser.parse_args(arguments)
    device, shrink = options.device, options.shrink
    print(f"{name_of(device)}, torch {torch.__version__}, {options}")
    ceiling = matmul_rate(8192 // shrink, torch.bfloat16, device)
    copied = copy_rate((4 << 30) // shrink**2, device)
    print(f"bf16 matmul {ceiling / 1e12:.3g} TFLOP/s, device copy {copied / 1e12:.3g} TB/s")
    files = random_files(options.model, options.layers)
    rates = Rates(files, device, shrink, ceiling)
    model = random_model(files, device)
    print(f"weights resident {peak_gb(device):.1f} GB")
    print(f"{'run':<44} {'tok/s':>8} {'share':>7} {'peak GB':>8}")
    if options.part == "packed":
        packed(rates, model, options.model == "120b")
    elif options.part == "streamed":
        streamed(rates, model)
    else:
        peer(rates, model)
    return rates.found


def packed(rates: Rates, model: Any, large: bool) -> None:
    """Experts as they are stored; the head alone; putting on another plan."""
    every = ("layers", "profile 2/3", "profile all", "evaluate 2/3")
    rates.ours(model, "packed", 2048, 32768, every)
    if not large:
        rates.ours(model, "packed", 2048, 16384, ("evaluate 2/3", "profile 2/3"))
        for seq_len in (1024, 16384):
            rates.ours(model, "packed", seq_len, 32768, ("evaluate 2/3",))
    rates.ours(model, "packed", 131072, 131072, ("evaluate 2/3",))
    head_cost(model, 16384 // rates.shrink, rates.device)
    masked_switch(model, rates)


def streamed(rates: Rates, model: Any) -> None:
    """Half of the layers in host memory."""
    resident = some_trace(rates, model)
    half = len(model.base_model.layers) // 2
    model = random_model(rates.files, rates.device, streamed=half)
    waiting = half * weigh(rates.files, torch.bfloat16, 16384).layer / 1e9
    print(f"{half} layers streamed, {waiting:.1f} GB in host memory:")
    check_equal(resident, some_trace(rates, model))
    rates.ours(model, "streamed", 2048, 32768, ("evaluate 2/3",))


def peer(rates: Rates, model: Any) -> None:
    """The same weights dequantised once: ours, then transformers' own layers."""
    resident = some_trace(rates, model)
    unpack(model)
    print("dequantised once, the same weights:")
    check_equal(resident, some_trace(rates, model))
    rates.ours(model, "bf16", 2048, 32768, ("layers", "profile 2/3", "evaluate 2/3"))
    # flex attention has no sinks on the CPU
    attention = "flex_attention" if rates.device.type == "cuda" else "eager"
    model.set_attn_implementation(attention)
    model.set_experts_implementation("grouped_mm")
    seq_len = 2048 // rates.shrink
    blocks = random_blocks(16, seq_len, rates.config["vocab_size"])
    ids = torch.from_numpy(blocks.ids_BS).long().to(rates.device)
    flops = flops_per_token(rates.config, seq_len, 0)
    rates.line(
        f"transformers, {attention} + grouped_mm: layers", partial(plain_forward, model, ids),
        ids.numel(), flops,
    )  # fmt: skip


def some_trace(rates: Rates, model: Any) -> Trace:
    """A trace of a few blocks, to compare with that of the same weights held in another way."""
    blocks = random_blocks(8, 2048 // rates.shrink, rates.config["vocab_size"])
    return engine_of(model, rates.files, 16384 // rates.shrink).trace(blocks, untold)


def check_equal(a: Trace, b: Trace) -> None:
    """Raise AssertionError unless two traces are equal to the last bit."""
    for name in ("experts_TLK", "weights_TLK", "norms_TLK"):
        assert np.array_equal(getattr(a, name), getattr(b, name)), name
    assert np.array_equal(a.scores.logp_T, b.scores.logp_T)
    assert np.array_equal(a.scores.entropy_T, b.scores.entropy_T)
    print("trace and scores equal to the last bit")


def copy_rate(size: int, device: torch.device) -> float:
    """Bytes read and written per second by a copy on the device."""
    source = torch.randint(0, 256, (size,), device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    spent = seconds(lambda: [target.copy_(source) for _ in range(4)], device=device)
    return 4 * 2 * source.numel() / spent


@torch.inference_mode()
def plain_forward(model: Any, ids: torch.Tensor) -> None:
    """transformers' own layers."""
    model.base_model(input_ids=ids, use_cache=False)


@torch.inference_mode()
def head_cost(model: Any, tokens: int, device: torch.device) -> None:
    """log p, top-20 and entropy against the bare head matmul."""
    head = model.get_output_embeddings()
    hidden = torch.randn(tokens, head.weight.shape[1], device=device, dtype=torch.bfloat16)
    targets = torch.randint(0, head.weight.shape[0], (tokens,), device=device)
    bare = seconds(lambda: [head(part) for part in hidden.split(5000)], 9, device)
    ours = seconds(lambda: token_scores(PlainHead(model), hidden, targets, 20), 9, device)
    print(
        f"head, {tokens} tokens: bare matmul {bare * 1e3:.1f} ms, with log p, top-20 and entropy "
        f"{ours * 1e3:.1f} ms: {ours / bare:.2f}x"
    )


def masked_switch(model: Any, rates: Rates) -> None:
    """Seconds to put on another keep plan and take it off again."""
    engine = engine_of(model, rates.files, 16384 // rates.shrink)
    layers, count = rates.config["num_hidden_layers"], rates.config["num_local_experts"]
    plan = KeepPlan((tuple(range(count * 3 // 4)),) * layers, count)

    def switch() -> None:
        with engine.masked(plan):
            pass

    print(f"masking another plan: {seconds(switch, 9, rates.device) * 1e3:.2f} ms")


if __name__ == "__main__":
    main()
