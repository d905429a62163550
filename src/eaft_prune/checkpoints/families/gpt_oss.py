"""gpt-oss: router with a bias, fused gate_up and down projections, MXFP4 or plain experts.

Written out, as the one family whose published format fuses what is packed, whose experts stay
packed in memory, and which a laptop has to open without importing torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eaft_prune.checkpoints.families.base import (
    Config,
    Family,
    Table,
    TensorSpec,
    check_plan,
    positive,
)
from eaft_prune.checkpoints.families.table import (
    check_counts,
    checked,
    plain,
    stored,
    without_quantisation,
)
from eaft_prune.checkpoints.formats import MXFP4
from eaft_prune.checkpoints.read import ModelFiles
from eaft_prune.core.types import KeepPlan, UserError

if TYPE_CHECKING:
    import torch


def tensor_table(config: Config) -> dict[str, TensorSpec]:
    """Every tensor of a checkpoint with this config.json."""
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
            prefix + "mlp.router.weight": TensorSpec(None, (count, hidden), layer, axis=0),
            prefix + "mlp.router.bias": TensorSpec(None, (count,), layer, axis=0),
        }
        for name, rows, columns in (
            ("gate_up_proj", 2 * inner, hidden),
            ("down_proj", hidden, inner),
        ):
            expert = prefix + f"mlp.experts.{name}"
            table[expert + "_bias"] = TensorSpec(None, (count, rows), layer, axis=0)
            if _is_mxfp4(config):
                table |= stored(expert, MXFP4, (count, rows, columns), layer)
            else:
                table[expert] = TensorSpec(None, (count, columns, rows), layer, axis=0)
    return table


def _table(model: ModelFiles) -> Table:
    check_counts(model, _n_layers(model.config), _n_experts(model.config))
    table = tensor_table(model.config)
    if _is_mxfp4(model.config) and set(table) - set(model.tensors):
        floats = tensor_table(without_quantisation(model).config)
        if not set(floats) - set(model.tensors):
            raise UserError(
                f"{model.path / 'config.json'}: quantization_config says mxfp4, but the weights "
                "are plain floats: remove quantization_config"
            )
    return checked("gpt_oss", table, model)


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


def _load(path: Path, config: Config, **arguments: Any) -> Any:
    from transformers import AutoModelForCausalLM

    if _is_mxfp4(config) and "quantization_config" not in arguments:
        from transformers import Mxfp4Config

        arguments["quantization_config"] = Mxfp4Config(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(
        path,
        # what `eval.top_k` changes; otherwise what config.json says anyway
        num_experts_per_tok=positive(config, "num_experts_per_tok"),
        local_files_only=True,
        trust_remote_code=False,  # left out, transformers asks, and `yes |` answers
        **arguments,
    )


def _layers(model: torch.nn.Module) -> list[Any]:
    return list(model.get_submodule("model.layers").children())


@contextmanager
def _masked(model: torch.nn.Module, plan: KeepPlan) -> Iterator[None]:
    """Inside, dropped experts' router logits are -inf.

    Exact: the router takes the top k logits and softmaxes over the chosen, so a dropped expert
    changes neither the choice among the kept ones nor their weights.
    """
    routers = [layer.mlp.router for layer in _layers(model)]
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


def _n_layers(config: Config) -> int:
    return positive(config, "num_hidden_layers")


def _n_experts(config: Config) -> int:
    return positive(config, "num_local_experts")


FAMILY = Family(
    model_type="gpt_oss",
    n_layers=_n_layers,
    n_experts=_n_experts,
    top_k=lambda config: positive(config, "num_experts_per_tok"),
    groups=lambda config: 1,
    least=lambda config: positive(config, "num_experts_per_tok"),
    layer_numbers=lambda config: tuple(range(_n_layers(config))),
    language=lambda config: config,
    table=_table,
    patch_config=_patch_config,
    with_top_k=lambda config, top_k: {**config, "num_experts_per_tok": top_k},
    load=_load,
    experts=lambda model: [layer.mlp.experts for layer in _layers(model)],
    masked=_masked,
)
