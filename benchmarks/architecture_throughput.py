"""Tokens per second of models that transformers describes, at their published shapes, on one GPU.

    PYTHONPATH=src python benchmarks/architecture_throughput.py [--model qwen3-30b] [--layers 12]
        [--device cuda] [--shrink 1] [--kernels]

Random bf16 weights made on the device. One run measures the matmul ceiling, transformers' own
layers (its sdpa and grouped_mm) and ours on the same weights; `share` is of the ceiling, counted
over active FLOPs as in gpu_throughput.py. --kernels names what the time of profiling goes into.
--shrink divides lengths, batches and the ceiling's size: `--model tiny --device cpu --shrink 64`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from common import (
    device_of,
    forget_peak,
    matmul_rate,
    name_of,
    peak_gb,
    random_blocks,
    seconds,
    untold,
)

from eaft_prune.checkpoints.families import family_of
from eaft_prune.engines.experts import NAME
from eaft_prune.engines.fused_layers import as_written, fuse
from eaft_prune.engines.loading import register
from eaft_prune.engines.plain_check import check_against_plain, made_up_tokens
from eaft_prune.engines.transformers import TransformersEngine

SEQ_LEN, BATCH = 2048, 32768
# as published; what is not named is the default of transformers' class
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-30b": {
        "model_type": "qwen3_moe", "hidden_size": 2048, "num_attention_heads": 32,
        "num_key_value_heads": 4, "head_dim": 128, "moe_intermediate_size": 768,
        "num_experts": 128, "num_experts_per_tok": 8, "vocab_size": 151936,
        "num_hidden_layers": 48, "max_position_embeddings": 40960, "norm_topk_prob": True,
    },
    "glm-4.5-air": {
        "model_type": "glm4_moe", "hidden_size": 4096, "num_attention_heads": 96,
        "num_key_value_heads": 8, "head_dim": 128, "moe_intermediate_size": 1408,
        "intermediate_size": 10944, "n_routed_experts": 128, "num_experts_per_tok": 8,
        "n_shared_experts": 1, "first_k_dense_replace": 1, "vocab_size": 151552,
        "num_hidden_layers": 46, "attention_bias": True, "max_position_embeddings": 131072,
    },
    "tiny": {
        "model_type": "qwen3_moe", "hidden_size": 64, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "moe_intermediate_size": 32, "num_experts": 8,
        "num_experts_per_tok": 2, "vocab_size": 300, "num_hidden_layers": 2,
    },
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Tokens per second of every line."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=sorted(SHAPES), default="qwen3-30b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--device", type=device_of, default="cuda")
    parser.add_argument("--shrink", type=int, default=1)
    parser.add_argument("--kernels", action="store_true")
    options = parser.parse_args(arguments)
    device, shrink = options.device, options.shrink
    print(f"{name_of(device)}, torch {torch.__version__}, {options}")
    ceiling = matmul_rate(8192 // shrink, torch.bfloat16, device)
    print(f"bf16 matmul {ceiling / 1e12:.3g} TFLOP/s")
    config = dict(SHAPES[options.model])
    config["num_hidden_layers"] = options.layers or config["num_hidden_layers"]
    model = random_model(config, device)
    engine = engine_of(model, config, BATCH // shrink)
    if device.type == "cuda":
        print(f"{fuse(model, made_up_tokens(model))} norms and attentions fused")
    gap = check_against_plain(model, engine.logits, "bfloat16")
    print(f"total variation to transformers' eager: {gap:.2g}")
    print(f"{'run':<34} {'tok/s':>8} {'share':>7} {'peak GB':>8}")
    found: dict[str, float] = {}
    blocks = 4 * BATCH // SEQ_LEN
    for name, share in (("layers", 0.0), ("profile", 2 / 3), ("evaluate", 2 / 3)):
        some = random_blocks(blocks, SEQ_LEN // shrink, config["vocab_size"], share)
        run = engine.trace if name == "profile" else engine.score
        forget_peak(device)
        rate = found[name] = some.ids_BS.size / seconds(partial(run, some, untold), device=device)
        show(name, rate * flops(model, engine, SEQ_LEN // shrink, share) / ceiling, rate, device)
        if name == "profile" and options.kernels:
            print(kernels(partial(run, some, untold)))
    some = random_blocks(blocks, SEQ_LEN // shrink, config["vocab_size"])
    with as_written(model):
        model.set_attn_implementation("sdpa")
        model.set_experts_implementation("grouped_mm" if device.type == "cuda" else "eager")
        forget_peak(device)
        ids = torch.from_numpy(some.ids_BS).long().to(device)
        rate = ids.numel() / seconds(partial(plain_forward, model, ids), device=device)
    found["transformers: layers"] = rate
    share = rate * flops(model, engine, SEQ_LEN // shrink, 0.0) / ceiling
    show("transformers, sdpa + grouped_mm", share, rate, device)
    return found


def show(name: str, share: float, rate: float, device: torch.device) -> None:
    """A line of the table."""
    print(f"{name:<34} {rate:>8.0f} {share:>6.1%} {peak_gb(device):>8.1f}", flush=True)


def random_model(config: dict[str, Any], device: torch.device) -> Any:
    """transformers' model of random weights, run by our experts."""
    from transformers import AutoConfig, AutoModelForCausalLM

    register()
    settings = AutoConfig.for_model(**config)
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(
            settings, trust_remote_code=False, dtype=torch.bfloat16, experts_implementation=NAME
        )
    return model.eval().to(device)


def engine_of(model: Any, config: dict[str, Any], tokens: int) -> TransformersEngine:
    """An engine over it."""
    family = family_of(config)
    return TransformersEngine(
        model, family, next(model.parameters()).device, "bfloat16", tokens, 20,
        family.top_k(config), family.n_experts(config),
    )  # fmt: skip


def flops(model: Any, engine: TransformersEngine, seq_len: int, scored: float) -> float:
    """2 x the multiply-adds a token needs: its experts' share of their weights, attended keys."""
    total = 0.0
    for name, weight in model.named_parameters():
        if weight.ndim == 3:
            total += weight.numel() * engine.top_k / engine.n_experts
        elif weight.ndim == 2 and "embed" not in name:
            total += weight.numel() * (scored if name.startswith("lm_head") else 1.0)
    text = model.config.get_text_config()
    attended = 2 * text.num_attention_heads * text.head_dim * seq_len / 2
    return float(2 * (total + text.num_hidden_layers * attended))


@torch.inference_mode()
def plain_forward(model: Any, ids: torch.Tensor) -> None:
    """transformers' own layers, in the batches that ours has."""
    for part in torch.split(ids, BATCH // SEQ_LEN):
        model.base_model(input_ids=part, use_cache=False)


def kernels(run: Any) -> str:
    """What the device's time goes into."""
    with torch.profiler.profile() as profile:
        run()
    table: str = profile.key_averages().table(sort_by="self_cuda_time_total", row_limit=25)
    return table


if __name__ == "__main__":
    main()
