"""Tokens per second at the real shapes of gpt-oss with random MXFP4 experts, on one GPU.

    PYTHONPATH=src python benchmarks/gpu_throughput.py [--model 20b] [--part packed|streamed|peer]

One run measures the ceilings (bf16 matmul, device copy), ours, and the peer's way on the same
weights (transformers: flex attention and grouped_mm). `share` is of the matmul ceiling, counted
over active FLOPs: projections, chosen experts, router, attended keys, the head where scored.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from random_model import engine_of, random_blocks, random_files, random_model, unpack

from eaft_prune.core.types import KeepPlan
from eaft_prune.engines.head import token_scores
from eaft_prune.engines.packed_model import weigh

GPU = torch.device("cuda", 0)


def median_seconds(run: Callable[[], object], repeats: int = 3) -> float:
    """Median wall time after one warm-up, the device idle at both ends."""
    run()
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def body_flops_per_token(config: Any, seq_len: int) -> float:
    """2 x multiply-adds of the layers: projections, active experts, router, attended keys."""
    h, q = config["hidden_size"], config["num_attention_heads"] * config["head_dim"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    expert = 3 * h * config["intermediate_size"]
    attended = (seq_len / 2 + min(config["sliding_window"], seq_len / 2)) / 2
    layer = h * (2 * q + 2 * kv) + config["num_experts_per_tok"] * expert
    layer += h * config["num_local_experts"] + 2 * q * attended
    return float(2.0 * config["num_hidden_layers"] * layer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("20b", "120b"), default="20b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--part", choices=("packed", "streamed", "peer"), default="packed")
    options = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {options}")
    ceiling = matmul_rate()
    print(f"bf16 matmul {ceiling / 1e12:.0f} TFLOP/s, device copy {copy_rate() / 1e12:.2f} TB/s")
    files = random_files(options.model, options.layers)
    config = files.config
    model = random_model(files, GPU)
    print(f"weights resident {torch.cuda.memory_allocated() / 1e9:.1f} GB")
    print(f"{'run':<44} {'tok/s':>8} {'share':>7} {'peak GB':>8}")

    def show(name: str, run: Callable[[], object], tokens: int, flops: float) -> None:
        torch.cuda.reset_peak_memory_stats()
        rate = tokens / median_seconds(run)
        peak = torch.cuda.max_memory_allocated() / 1e9
        print(f"{name:<44} {rate:>8.0f} {rate * flops / ceiling:>6.1%} {peak:>8.1f}", flush=True)

    head = 2.0 * config["hidden_size"] * config["vocab_size"]

    def rates(kind: str, seq_len: int, batch_tokens: int, names: tuple[str, ...]) -> None:
        count = max(1, 4 * batch_tokens // seq_len)
        body = body_flops_per_token(config, seq_len)
        where = f"{kind}, S {seq_len}, batch {batch_tokens}"
        engine = engine_of(model, files, batch_tokens)
        for name in names:
            share = {"layers": 0.0, "2/3": 2 / 3, "all": 1.0}[name.split()[-1]]
            blocks = random_blocks(count, seq_len, config["vocab_size"], share or 2 / 3)
            work = {"layers": lambda e=engine, b=blocks: body_only(e, b), "evaluate": engine.score}
            run = work.get(name.split()[0], engine.trace)
            if name == "layers":
                show(f"{where}: layers", run, blocks.ids_BS.size, body)
                continue
            flops = body + share * head
            show(
                f"{where}: {name} scored",
                lambda r=run, b=blocks: r(b, _ignore),
                blocks.ids_BS.size,
                flops,
            )

    if options.part == "packed":
        every = ("layers", "profile 2/3", "profile all", "evaluate 2/3")
        rates("packed", 2048, 32768, every)
        if options.model == "20b":
            rates("packed", 2048, 16384, ("evaluate 2/3", "profile 2/3"))
            for seq_len in (1024, 16384):
                rates("packed", seq_len, 32768, ("evaluate 2/3",))
        rates("packed", 131072, 131072, ("evaluate 2/3",))
        head_cost(model)
        masked_switch(model, files)
        return
    blocks = random_blocks(8, 2048, config["vocab_size"])
    packed = engine_of(model, files, 16384).trace(blocks, _ignore)
    if options.part == "streamed":
        half = len(model.base_model.layers) // 2
        del model
        torch.cuda.empty_cache()
        model = random_model(files, GPU, streamed=half)
        waiting = half * weigh(files, torch.bfloat16, 16384).layer / 1e9
        print(f"{half} layers streamed, {waiting:.1f} GB in host memory:")
        equal(packed, engine_of(model, files, 16384).trace(blocks, _ignore))
        rates("streamed", 2048, 32768, ("evaluate 2/3",))
        return
    unpack(model)
    print("dequantised once, the same weights:")
    equal(packed, engine_of(model, files, 16384).trace(blocks, _ignore))
    rates("bf16", 2048, 32768, ("layers", "profile 2/3", "evaluate 2/3"))
    model.set_attn_implementation("flex_attention")
    model.set_experts_implementation("grouped_mm")
    ids = torch.from_numpy(random_blocks(16, 2048, 200000).ids_BS).long().to(GPU)
    show(
        "transformers, flex + grouped_mm: layers",
        lambda: plain_forward(model, ids),
        ids.numel(),
        body_flops_per_token(config, 2048),
    )


def matmul_rate() -> float:
    """FLOP/s of an 8192^3 product of random bf16 matrices."""
    a, b = (torch.randn(8192, 8192, device=GPU, dtype=torch.bfloat16) for _ in range(2))
    return 20 * 2 * 8192**3 / median_seconds(lambda: [a @ b for _ in range(20)])


def copy_rate() -> float:
    """Bytes read and written per second by a copy on the device."""
    source = torch.randint(0, 256, (4 << 30,), device=GPU, dtype=torch.uint8)
    target = torch.empty_like(source)
    seconds = median_seconds(lambda: [target.copy_(source) for _ in range(4)])
    return 4 * 2 * source.numel() / seconds


@torch.inference_mode()
def body_only(engine: Any, blocks: Any) -> None:
    """The layers without the head."""
    for ids, _, _ in engine._batches(blocks):
        engine._hidden(ids)


@torch.inference_mode()
def plain_forward(model: Any, ids: torch.Tensor) -> None:
    """transformers' own layers."""
    model.base_model(input_ids=ids, use_cache=False)


@torch.inference_mode()
def head_cost(model: Any) -> None:
    """log p, top-20 and entropy of 16,384 tokens against the bare head matmul."""
    head = model.get_output_embeddings()
    hidden = torch.randn(16384, head.weight.shape[1], device=GPU, dtype=torch.bfloat16)
    targets = torch.randint(0, head.weight.shape[0], (16384,), device=GPU)
    bare = median_seconds(lambda: [head(part) for part in hidden.split(5000)], 9)
    ours = median_seconds(lambda: token_scores(head, hidden, targets, 20), 9)
    print(
        f"head, 16384 tokens: bare matmul {bare * 1e3:.1f} ms, with log p, top-20 and entropy "
        f"{ours * 1e3:.1f} ms: {ours / bare:.2f}x"
    )


def masked_switch(model: Any, files: Any) -> None:
    """Seconds to put on another keep plan and take it off again."""
    engine = engine_of(model, files, 16384)
    config = files.config
    layers, count = config["num_hidden_layers"], config["num_local_experts"]
    plan = KeepPlan((tuple(range(count * 3 // 4)),) * layers, count)

    def switch() -> None:
        with engine.masked(plan):
            pass

    print(f"masking another plan: {median_seconds(switch, 9) * 1e3:.2f} ms")


def equal(a: Any, b: Any) -> None:
    """Say whether two traces are equal to the last bit."""
    same = all(
        np.array_equal(x, y)
        for x, y in (
            (a.scores.logp_T, b.scores.logp_T),
            (a.scores.entropy_T, b.scores.entropy_T),
            (a.experts_TLK, b.experts_TLK),
            (a.norms_TLK, b.norms_TLK),
        )
    )
    print(f"trace and scores equal to the last bit: {same}")


def _ignore(done: int) -> None:
    pass


if __name__ == "__main__":
    main()
