"""Write a checkpoint of gpt-oss-20b's or -120b's real shape, filled with random bytes.

    python benchmarks/random_checkpoint.py --out DIR [--model 20b|120b|tiny] [--layers N]
        [--experts N] [--tokenizer DIR]

Same tensor names, types and shapes as the published checkpoints; shards of 4.8 GB. Random e2m1
values with scales near 2^-6, random bf16 elsewhere: nothing meaningful, but everything loads.
`tiny` is of no published shape: it is there to try scripts.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import struct
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from eaft_prune.checkpoints.families.gpt_oss import tensor_table

SHAPES: dict[str, dict[str, int]] = {
    "20b": {"num_hidden_layers": 24, "num_local_experts": 32},
    "120b": {"num_hidden_layers": 36, "num_local_experts": 128},
    "tiny": {
        "num_hidden_layers": 2, "num_local_experts": 8, "hidden_size": 128, "intermediate_size": 64,
        "head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 32,
        "vocab_size": 512, "eos_token_id": 2, "pad_token_id": 1,
    },
}  # fmt: skip
SHARD_BYTES = 4_800_000_000
CHUNK = 64 << 20

Entry = tuple[str, str, tuple[int, ...], int]  # name, dtype, shape, bytes


def config_json(
    model: str, layers: int | None = None, experts: int | None = None
) -> dict[str, Any]:
    """config.json of a model of SHAPES, with other numbers of layers and experts if given."""
    shape = dict(SHAPES[model])
    shape["num_hidden_layers"] = layers or shape["num_hidden_layers"]
    shape["num_local_experts"] = experts or shape["num_local_experts"]
    return {
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "eos_token_id": 200002,
        "experts_per_token": 4,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 2880,
        "initial_context_length": 4096,
        "intermediate_size": 2880,
        "layer_types": ["sliding_attention", "full_attention"] * (shape["num_hidden_layers"] // 2),
        "max_position_embeddings": 131072,
        "model_type": "gpt_oss",
        "num_attention_heads": 64,
        "num_experts_per_tok": 4,
        "num_key_value_heads": 8,
        "pad_token_id": 199999,
        "quantization_config": {
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
            "quant_method": "mxfp4",
        },
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "rope_type": "yarn",
            "truncate": False,
        },
        "rope_theta": 150000,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
        "vocab_size": 201088,
        **shape,
    }


def random_bytes(rng: np.random.Generator, name: str, count: int) -> bytes:
    """Random contents of a tensor: e8m0 scales near 2^-6, small bf16 floats, any e2m1 codes."""
    if name.endswith("_scales"):
        return rng.integers(119, 123, count, np.uint8).tobytes()
    if name.endswith("_blocks"):
        return rng.bytes(count)
    floats = rng.standard_normal(count // 2, np.float32) * np.float32(0.02)
    return (floats.view(np.uint32) >> np.uint32(16)).astype("<u2").tobytes()


def write_shard(path: Path, shard: list[Entry], seed: int) -> None:
    """One safetensors file of random contents."""
    rng = np.random.default_rng(seed)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dtype, shape, size in shard:
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for name, _, _, size in shard:
            for first in range(0, size, CHUNK):
                out.write(random_bytes(rng, name, min(CHUNK, size - first)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Bytes of the weights written."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", choices=sorted(SHAPES), default="20b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--experts", type=int, help="a layer, as after pruning")
    parser.add_argument("--tokenizer", type=Path, help="a directory to copy tokenizer files from")
    options = parser.parse_args(arguments)
    config = config_json(options.model, options.layers, options.experts)
    options.out.mkdir(parents=True)
    (options.out / "config.json").write_text(json.dumps(config, indent=2))
    for file in options.tokenizer.glob("*token*") if options.tokenizer else ():
        shutil.copy(file, options.out)
    entries = []
    for name, spec in tensor_table(config).items():
        width = 1 if spec.dtype == "U8" else 2
        entries.append((name, spec.dtype or "BF16", spec.shape, width * int(np.prod(spec.shape))))
    shards: list[list[Entry]] = [[]]
    for entry in entries:
        if shards[-1] and sum(e[3] for e in shards[-1]) + entry[3] > SHARD_BYTES:
            shards.append([])
        shards[-1].append(entry)
    started = time.perf_counter()
    weight_map = {}
    jobs = []
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map.update({name: file for name, *_ in shard})
        jobs.append((options.out / file, shard, number))
    with ProcessPoolExecutor(min(len(jobs), os.cpu_count() or 1)) as pool:
        list(pool.map(write_shard, *zip(*jobs, strict=True)))
    total = sum(e[3] for e in entries)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (options.out / "model.safetensors.index.json").write_text(json.dumps(index))
    print(f"{total / 1e9:.2f} GB in {len(shards)} shards, {time.perf_counter() - started:.0f} s")
    return total


if __name__ == "__main__":
    main()
