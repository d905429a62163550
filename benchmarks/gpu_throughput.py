"""Tokens per second of profile and evaluate at the shape of gpt-oss-20b, random weights, one GPU.

    PYTHONPATH=src python benchmarks/gpu_throughput.py [--layers 24] [--seq-len 2048] [--batch 16]

Beside the rates: the bf16 matmul rate measured in the same run, the share of it that the active
FLOPs of the model reach, and transformers' own path (flex attention, grouped_mm) on the same model.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from cpu_throughput import random_blocks
from transformers import GptOssConfig, GptOssForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from eaft_prune.engines import attention, experts
from eaft_prune.engines.transformers import TransformersEngine
from eaft_prune.families.gpt_oss import FAMILY


def random_model(layers: int) -> GptOssForCausalLM:
    """gpt-oss-20b's shape in bf16 with small random weights, made on the device."""
    config = GptOssConfig(
        num_hidden_layers=layers,
        num_local_experts=32,
        rope_parameters={"rope_type": "default", "rope_theta": 150000.0},
    )
    with torch.device("meta"):
        model = GptOssForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device="cuda")
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02)
    for buffer in model.buffers():
        buffer.data.fill_(0.5)
    return model.eval()


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


def body_flops_per_token(config: GptOssConfig, seq_len: int) -> float:
    """2 x multiply-adds of the layers: projections, active experts, router, attended keys."""
    h, q = config.hidden_size, config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    expert = 3 * h * config.intermediate_size
    attended = (seq_len / 2 + min(config.sliding_window, seq_len / 2)) / 2
    layer = h * (2 * q + 2 * kv) + config.num_experts_per_tok * expert
    layer += h * config.num_local_experts + 2 * q * attended
    return 2.0 * config.num_hidden_layers * layer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=16)
    options = parser.parse_args()
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    b = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    ceiling = 20 * 2 * 8192**3 / median_seconds(lambda: [a @ b for _ in range(20)])
    model = random_model(options.layers)
    config = model.config
    ALL_ATTENTION_FUNCTIONS.register(attention.NAME, attention.sink_attention)
    ALL_EXPERTS_FUNCTIONS.register(experts.NAME, experts.experts_forward)
    tokens = options.batch * options.seq_len
    engine = TransformersEngine(
        model, FAMILY, torch.device("cuda"), "bfloat16", tokens, 20, config.num_experts_per_tok, 32
    )
    blocks = random_blocks(options.batch * 2, options.seq_len, config.vocab_size)
    ids = torch.from_numpy(blocks.ids_BS[: options.batch]).long().cuda()
    body = body_flops_per_token(config, options.seq_len)
    head = 2.0 * config.hidden_size * config.vocab_size * 2 / 3

    @torch.inference_mode()
    def forward() -> None:
        model.base_model(input_ids=ids, use_cache=False)

    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {options}")
    print(f"bf16 matmul {ceiling / 1e12:.0f} TFLOP/s")
    print(f"{'run':<34} {'tok/s':>9} {'share of matmul':>16} {'peak GB':>8}")

    def show(name: str, run: Callable[[], object], count: int, flops: float) -> None:
        torch.cuda.reset_peak_memory_stats()
        rate = count / median_seconds(run)
        peak = torch.cuda.max_memory_allocated() / 1e9
        print(f"{name:<34} {rate:>9.0f} {rate * flops / ceiling:>15.1%} {peak:>8.1f}", flush=True)

    model.set_attn_implementation(attention.NAME)
    model.set_experts_implementation(experts.NAME)
    show("ours, layers only", forward, tokens, body)
    total = blocks.ids_BS.size
    show("ours, evaluate (2/3 scored)", lambda: engine.score(blocks, _ignore), total, body + head)
    show("ours, profile (2/3 scored)", lambda: engine.trace(blocks, _ignore), total, body + head)
    model.set_attn_implementation("flex_attention")
    model.set_experts_implementation("grouped_mm")
    show("transformers flex + grouped_mm", forward, tokens, body)


def _ignore(done: int) -> None:
    pass


if __name__ == "__main__":
    main()
