"""A tiny random checkpoint of every architecture that transformers routes through one interface.

Made by transformers' own classes from their own defaults, with sizes made small, and saved by it in
the layout of the hub.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

EXPERTS = 8
VOCAB = 256

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "first_k_dense_replace": 1,
    "shared_expert_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "sliding_window": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_head_dim": 16,
    "linear_num_heads": 4,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 16,
    "mamba_d_state": 8,
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_n_groups": 1,
    "n_group": 1,
    "topk_group": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), EXPERTS),
    "moe_num_experts": EXPERTS,
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk"), 2),
}
# what some classes leave open, or take from `layer_types`
_OPEN = ("num_experts_per_tok", "head_dim", "moe_intermediate_size", "n_routed_experts")
# of vision and audio towers
_TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "depth": 1,
    "num_heads": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "out_hidden_size": 64,
    "embed_dim": 32,
    "num_layers": 1,
    "deepstack_visual_indexes": [0],
    "d_model": 32,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "output_dim": 64,
    "text_hidden_size": 64,
    "downsample_hidden_size": 8,
    "conv_chunksize": 8,
}
_DENSE_FIRST = {"mlp_layer_types": ["dense", "sparse", "sparse"]}
_GEMMA4 = {
    "enable_moe_block": True,
    "num_experts": EXPERTS,
    "top_k_experts": 2,
    "moe_intermediate_size": 32,
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 8,
    "global_head_dim": 16,
    "num_kv_shared_layers": 0,
}
_SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}

# model_type -> what its tiny version needs besides
WANTED: dict[str, dict[str, Any]] = {
    "deepseek_v3": {},
    "deepseek_v4": {"mlp_layer_types": ["hash_moe", "hash_moe", "moe"]},
    "ernie4_5_moe": {},
    "gemma4": _GEMMA4,
    "glm4_moe": {},
    "glm4v_moe": {"rope_parameters": {**_SECTIONS, "mrope_section": [2, 1, 1]}},
    "glm5_next": {"num_key_value_heads": 4, "qk_rope_head_dim": 0, **_DENSE_FIRST},
    "glm_moe_dsa": {},
    "gpt_oss": {},
    "granitemoehybrid": {},
    "hunyuan_v1_moe": {"moe_topk": 2},
    "kimi_linear": {},
    "mimo_v2_flash": {},
    "minimax_m2": {},
    "mixtral": {},
    "nemotron_h": {},
    "olmoe": {},
    "qwen3_5_moe": {},
    "qwen3_moe": {},
    "qwen3_next": {},
    "qwen3_omni_moe_thinker": {},
    "qwen3_vl_moe": {},
}
OTHERS: dict[str, dict[str, Any]] = {
    "afmoe": {},
    "aria": {},
    "aria_text": {},
    "axk1": {},
    "axk2": {},
    "bailing_hybrid": {"num_expert_group": 1},
    "beam": _DENSE_FIRST,
    "cohere2_moe": {},
    "deepseek_v2": {},
    "deepseek_v32": {},
    "dots1": {"n_shared_experts": 1},
    "dots3_note": {},
    "dots3_note_text": {},
    "exaone_moe": {},
    "flex_olmo": {},
    "flint": {},
    "gemma4_text": _GEMMA4,
    "glm4_moe_lite": {},
    "granitemoe": {},
    "granitemoe_swa": {},
    "granitemoeshared": {},
    "hy_v3": {},
    "hy_v4": {},
    "inkling2": {},
    "inkling_text": {},
    "jamba": {},
    "kimi_k25": {},
    "kolibri1": {},
    "laguna": {},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "mellum": {},
    "minimax": {},
    "minimax_m3_vl": {},
    "mistral4": {},
    "mistral_large4": {},
    "muse_spark": {"moe_hidden_size": 48},
    "phimoe": {},
    "qwen2_moe": {},
    "qwen3_5_moe_text": {},
    "qwen4_exp": {},
    "solar_open": {},
    "unlimited_ocr": {},
    "zaya": {"num_experts_per_tok": 1},
}


# sub-configuration -> what that of a tiny model needs besides
TOWERS: dict[str, dict[str, dict[str, Any]]] = {
    "muse_spark": {
        "audio_config": {"patch_sizes": [16], "hidden_sizes": [32], "depths": [1]},
    },
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "dots3_note": {
        "vision_config": {
            "per_layer_config": {},
            "mlp_layer_types": ["dense"],
            "adapter_in_dim": 32,
            "adapter_out_dim": 64,
        },
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 64},
    },
}


def tiny_config(model_type: str, **changes: Any) -> Any:
    """transformers' settings of a tiny model; changes are of the language model."""
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[model_type]
    changes = {**{**WANTED, **OTHERS}.get(model_type, {}), **changes}
    defaults = kind()
    if "text_config" not in (kind.sub_configs or {}):
        return kind(**_small(defaults, changes))
    text = defaults.get_text_config()
    own = TOWERS.get(model_type, {})
    towers = {
        name: {**_known(sub, _TOWER), "model_type": sub.model_type, **own.get(name, {})}
        for name in kind.sub_configs
        if name != "text_config" and (sub := getattr(defaults, name, None)) is not None
    }
    language = {**_small(text, changes), "model_type": text.model_type}
    return kind(**_known(defaults, _SIZES), **towers, text_config=language)


def write(path: Path, model_type: str, seed: int = 0, **changes: Any) -> Any:
    """Save one into `path` and return transformers' model of it."""
    model = random_model(tiny_config(model_type, **changes), seed)
    model.save_pretrained(path)
    return model


def random_model(settings: Any, seed: int = 0) -> Any:
    """transformers' model of settings; weights of routers are large, so that they differ."""
    torch.manual_seed(seed)
    model = model_class(settings).from_config(settings).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            routes = any(part in name for part in ("gate", "router", "bias"))
            if routes and tensor.is_floating_point():
                tensor.add_(0.3 * torch.randn(tensor.shape, generator=generator))
            if not tensor.is_floating_point() and tensor.shape == (VOCAB, 2):
                # a table of the experts of every token
                tensor.copy_(torch.rand(VOCAB, EXPERTS, generator=generator).argsort()[:, :2])
    return model


def model_class(settings: Any) -> Any:
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
    )

    text = type(settings) in MODEL_FOR_CAUSAL_LM_MAPPING
    return AutoModelForCausalLM if text else AutoModelForImageTextToText


def _small(defaults: Any, changes: dict[str, Any]) -> dict[str, Any]:
    small = _known(defaults, _SIZES)
    if defaults.to_dict().get("kv_lora_rank"):  # latent attention: all heads, own widths
        small |= {"num_key_value_heads": 4}
        small.pop("head_dim", None)
    return {**small, **changes}


def _known(defaults: Any, sizes: dict[str, Any]) -> dict[str, Any]:
    """The sizes that a class has by these names."""
    have = defaults.to_dict()
    return {
        name: size
        for name, size in sizes.items()
        if name in have and (have[name] is not None or name in _OPEN)
    }
