"""gpt-oss: router with a bias, fused gate_up and down projections, MXFP4 or plain experts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from eaft_prune.checkpoints.families.base import (
    Config,
    Family,
    TensorSpec,
    check_plan,
    experts,
    layers,
    plain,
    positive,
    stored,
)
from eaft_prune.checkpoints.formats import MXFP4
from eaft_prune.core.types import KeepPlan, UserError

if TYPE_CHECKING:
    import torch


def _tensor_table(config: Config) -> dict[str, TensorSpec]:
    hidden, inner = positive(config, "hidden_size"), positive(config, "intermediate_size")
    count, head = positive(config, "num_local_experts"), positive(config, "head_dim")
    heads, kv_heads = (
        positive(config, "num_attention_heads"),
        positive(config, "num_key_value_heads"),
    )
    vocab = positive(config, "vocab_size")
    if _is_mxfp4(config):
        _check_groups(hidden_size=hidden, intermediate_size=inner)

    table = {"model.embed_tokens.weight": plain(vocab, hidden), "model.norm.weight": plain(hidden)}
    if not config.get("tie_word_embeddings", False):
        table["lm_head.weight"] = plain(vocab, hidden)
    for layer in range(positive(config, "num_hidden_layers")):
        prefix = f"model.layers.{layer}."
        table |= {
            prefix + "input_layernorm.weight": plain(hidden),
            prefix + "post_attention_layernorm.weight": plain(hidden),
            prefix + "self_attn.sinks": plain(heads),
            prefix + "self_attn.o_proj.weight": plain(hidden, heads * head),
        }
        for name, rows in (("q_proj", heads * head), ("k_proj", kv_heads * head)):
            table[prefix + f"self_attn.{name}.weight"] = plain(rows, hidden)
        table[prefix + "self_attn.v_proj.weight"] = plain(kv_heads * head, hidden)
        if config.get("attention_bias", True):
            table |= {
                prefix + "self_attn.q_proj.bias": plain(heads * head),
                prefix + "self_attn.k_proj.bias": plain(kv_heads * head),
                prefix + "self_attn.v_proj.bias": plain(kv_heads * head),
                prefix + "self_attn.o_proj.bias": plain(hidden),
            }
        table |= {
            prefix + "mlp.router.weight": TensorSpec(None, (count, hidden), per_expert=True),
            prefix + "mlp.router.bias": TensorSpec(None, (count,), per_expert=True),
        }
        for name, rows, columns in (
            ("gate_up_proj", 2 * inner, hidden),
            ("down_proj", hidden, inner),
        ):
            expert = prefix + f"mlp.experts.{name}"
            table[expert + "_bias"] = TensorSpec(None, (count, rows), per_expert=True)
            if _is_mxfp4(config):
                table |= stored(expert, MXFP4, (count, rows, columns))
            else:
                table[expert] = TensorSpec(None, (count, columns, rows), per_expert=True)
    return table


def _patch_config(config: Config, keep_n: int) -> dict[str, Any]:
    patched = {**config, "num_local_experts": keep_n}
    if "num_experts" in patched:
        patched["num_experts"] = keep_n
    return patched


def _is_mxfp4(config: Config) -> bool:
    return (config.get("quantization_config") or {}).get("quant_method") == "mxfp4"


def _check_groups(**sizes: int) -> None:
    assert MXFP4.grid is not None
    for name, size in sizes.items():
        if size % MXFP4.grid.group:
            raise UserError(
                f"config.json: {name} = {size} is no multiple of {MXFP4.grid.group}, the weights "
                "that share a scale in MXFP4"
            )


def _load_arguments(config: Config) -> dict[str, Any]:
    # what `eval.top_k` changes; otherwise what config.json says anyway
    arguments: dict[str, Any] = {"num_experts_per_tok": positive(config, "num_experts_per_tok")}
    if _is_mxfp4(config):
        from transformers import Mxfp4Config

        arguments["quantization_config"] = Mxfp4Config(dequantize=True)
    return arguments


@contextmanager
def _masked(model: torch.nn.Module, plan: KeepPlan) -> Iterator[None]:
    """Inside, dropped experts' router logits are -inf.

    Exact: the router takes the top k logits and softmaxes over the chosen, so a dropped expert
    changes neither the choice among the kept ones nor their weights.
    """
    routers = [layer.mlp.router for layer in layers(model)]
    check_plan(plan, len(routers), routers[0].num_experts)
    originals = [router.bias.data for router in routers]
    try:
        for router, kept in zip(routers, plan.kept, strict=True):
            bias = router.bias.data.new_full(router.bias.shape, float("-inf"))
            bias[list(kept)] = router.bias.data[list(kept)]
            router.bias.data = bias
        yield
    finally:
        for router, original in zip(routers, originals, strict=True):
            router.bias.data = original


FAMILY = Family(
    model_type="gpt_oss",
    n_layers=lambda config: positive(config, "num_hidden_layers"),
    n_experts=lambda config: positive(config, "num_local_experts"),
    top_k=lambda config: positive(config, "num_experts_per_tok"),
    tensor_tables=lambda config: [_tensor_table(config)],
    patch_config=_patch_config,
    load_arguments=_load_arguments,
    experts=experts,
    masked=_masked,
    router_bias=lambda layer: f"model.layers.{layer}.mlp.router.bias",
)
