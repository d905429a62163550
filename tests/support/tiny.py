"""Tiny random checkpoints on disk, and the text they read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

SPECIALS = (
    "<|startoftext|>", "<|endoftext|>", "<|return|>", "<|constrain|>", "<|channel|>",
    "<|start|>", "<|end|>", "<|message|>", "<|call|>",
)  # fmt: skip
WORDS = (
    "the", "a", "sum", "of", "is", "and", "model", "expert", "token", "router", "keeps", "drops",
    "seven", "nine", "plus", "equals",
)  # fmt: skip


def config(**changes: Any) -> dict[str, Any]:
    """config.json of a 2-layer gpt-oss with 8 experts, top-2; a change to None drops the key."""
    layers = changes.get("num_hidden_layers", 2)
    values = {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "attention_bias": True,
        "eos_token_id": 2,
        "pad_token_id": 1,
        "head_dim": 16,
        "hidden_act": "silu",
        "hidden_size": 64,
        "intermediate_size": 32,
        "max_position_embeddings": 4096,
        "num_attention_heads": 4,
        "num_experts_per_tok": 2,
        "num_hidden_layers": layers,
        "num_key_value_heads": 2,
        "num_local_experts": 8,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "sliding_window": 16,
        "swiglu_limit": 7.0,
        "layer_types": ["sliding_attention", "full_attention"] * (layers // 2),
        "tie_word_embeddings": False,
        "vocab_size": 300,
        "quantization_config": {
            "quant_method": "mxfp4",
            "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"],
        },
        **changes,
    }
    return {key: value for key, value in values.items() if value is not None}


def tensors(cfg: dict[str, Any], seed: int) -> dict[str, np.ndarray[Any, Any]]:
    """Random weights under the published names; floats as float32 holding bf16 values."""
    rng = np.random.default_rng(seed)
    h, i, e = cfg["hidden_size"], cfg["intermediate_size"], cfg["num_local_experts"]
    q = cfg["num_attention_heads"] * cfg["head_dim"]
    kv = cfg["num_key_value_heads"] * cfg["head_dim"]

    def normal(*shape: int, scale: float = 0.15) -> np.ndarray[Any, Any]:
        values = rng.normal(0, scale, shape).astype(np.float32)
        return (values.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)

    out = {
        "model.embed_tokens.weight": normal(cfg["vocab_size"], h, scale=1.0),
        "model.norm.weight": 1 + normal(h),
        "lm_head.weight": normal(cfg["vocab_size"], h, scale=0.4),
    }
    for layer in range(cfg["num_hidden_layers"]):
        p = f"model.layers.{layer}."
        out |= {
            p + "input_layernorm.weight": 1 + normal(h),
            p + "post_attention_layernorm.weight": 1 + normal(h),
            p + "self_attn.sinks": normal(cfg["num_attention_heads"], scale=1.0),
            p + "mlp.router.weight": normal(e, h, scale=0.5),
            p + "mlp.router.bias": normal(e, scale=0.5),
        }
        for name, rows, columns in (
            ("q_proj", q, h), ("k_proj", kv, h), ("v_proj", kv, h), ("o_proj", h, q),
        ):  # fmt: skip
            out[p + f"self_attn.{name}.weight"] = normal(rows, columns)
            out[p + f"self_attn.{name}.bias"] = normal(rows)
        for name, rows, columns in (("gate_up_proj", 2 * i, h), ("down_proj", h, i)):
            expert = p + f"mlp.experts.{name}"
            out[expert + "_bias"] = normal(e, rows)
            if "quantization_config" in cfg:
                shape = (e, rows, columns // 32)
                out[expert + "_blocks"] = rng.integers(0, 256, (*shape, 16), np.uint8)
                out[expert + "_scales"] = rng.integers(121, 125, shape, np.uint8)
            else:
                out[expert] = normal(e, columns, rows)
    return out


def write_checkpoint(
    path: Path, seed: int = 0, shards: int = 2, dtype: str = "F32", **changes: Any
) -> Path:
    """A loadable checkpoint directory: config, sharded weights, index, tokenizer."""
    cfg = config(**changes)
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(cfg, indent=2))
    write_weights(path, tensors(cfg, seed), shards, dtype)
    write_tokenizer(path)
    return path


MOE = {
    "attention_dropout": 0.0,
    "bos_token_id": None,
    "eos_token_id": 2,
    "head_dim": 16,
    "hidden_size": 64,
    "intermediate_size": 32,
    "max_position_embeddings": 4096,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "vocab_size": 300,
}
CHATML = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")


def write_moe(path: Path, model_type: str, fused: bool, seed: int = 0, **changes: Any) -> Path:
    """A qwen3_moe or mixtral checkpoint as transformers saves it; its tokenizer knows no harmony.

    Not fused is the hub's layout, with one tensor an expert and projection; config.json then has
    the hub's name for the number of experts too.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if model_type == "qwen3_moe":
        changes = {"moe_intermediate_size": 32, **changes}
    settings = AutoConfig.for_model(model_type, **{**MOE, **changes})
    model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
    rng = torch.Generator().manual_seed(seed)
    scales = {"embed_tokens.weight": 1.0, "lm_head.weight": 0.4, "gate.weight": 0.5}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = next((s for end, s in scales.items() if name.endswith(end)), 0.15)
            values = torch.randn(parameter.shape, generator=rng) * scale
            parameter.copy_(1 + values if name.endswith("norm.weight") else values)
    model.save_pretrained(path, save_original_format=not fused, max_shard_size="200KB")
    if model_type == "qwen3_moe" and not fused:
        values = json.loads((path / "config.json").read_text())
        values["num_experts"] = values.pop("num_local_experts")
        (path / "config.json").write_text(json.dumps(values, indent=2))
    write_tokenizer(path, CHATML)
    return path


def write_weights(
    path: Path, weights: dict[str, np.ndarray[Any, Any]], shards: int, dtype: str = "F32"
) -> None:
    """Sharded safetensors and their index; floats are stored as `dtype` (F32 or BF16)."""
    import torch
    from safetensors.torch import save_file

    def stored(array: np.ndarray[Any, Any]) -> torch.Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        return tensor.bfloat16() if dtype == "BF16" and array.dtype == np.float32 else tensor

    names = sorted(weights)
    weight_map: dict[str, str] = {}
    total = 0
    for number in range(shards):
        shard = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: stored(weights[name]) for name in names[number::shards]}
        save_file(part, path / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, shard)
        total += sum(tensor.nbytes for tensor in part.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def write_tokenizer(path: Path, specials: Sequence[str] = SPECIALS) -> None:
    """A byte-level tokenizer without merges whose first ids are the specials."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*specials, *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in specials])
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "eos_token": "<|return|>" if "<|return|>" in specials else specials[-1],
                "pad_token": "<|endoftext|>",
                "model_max_length": 4096,
            }
        )
    )


def rows(count: int, seed: int = 0) -> list[str]:
    """Harmony conversations of random words, with analysis, a tool call and a final answer."""
    rng = np.random.default_rng(seed)

    def words(n: int) -> str:
        return " ".join(rng.choice(WORDS, n))

    return [
        f"<|start|>user<|message|>{words(4)}<|end|>"
        f"<|start|>assistant<|channel|>analysis<|message|>{words(6)}<|end|>"
        f"<|start|>assistant to=functions.f<|channel|>commentary <|constrain|>json<|message|>"
        f'{{"x": {i}}}<|call|>'
        f"<|start|>functions.f to=assistant<|channel|>commentary<|message|>{words(3)}<|end|>"
        f"<|start|>assistant<|channel|>final<|message|>{words(8)}<|return|>"
        for i in range(count)
    ]


def eager_model(path: Path) -> Any:
    """The oracle: transformers' own eager experts and eager attention, float32."""
    import torch
    from transformers import AutoModelForCausalLM, Mxfp4Config

    quantized = "quantization_config" in json.loads((path / "config.json").read_text())
    arguments = {"quantization_config": Mxfp4Config(dequantize=True)} if quantized else {}
    model = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        local_files_only=True,
        **arguments,
    )
    return model.float().eval()  # transformers 5.17 leaves dequantised experts in bfloat16
