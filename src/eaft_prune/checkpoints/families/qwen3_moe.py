"""qwen3_moe: norms on queries and keys; router weights sum to 1 with `norm_topk_prob` only."""

from __future__ import annotations

from eaft_prune.checkpoints.families import softmax_moe
from eaft_prune.checkpoints.families.base import Config, Table, plain, positive
from eaft_prune.core.types import UserError


def _tensor_tables(config: Config) -> list[Table]:
    _check_sparse(config)
    inner, head = positive(config, "moe_intermediate_size"), softmax_moe.head_dim(config)
    decoder = softmax_moe.decoder_table(config, bool(config.get("attention_bias", False)))
    for prefix in softmax_moe.prefixes(config):
        for name in ("q_norm", "k_norm"):
            decoder[f"{prefix}self_attn.{name}.weight"] = plain(head)
    names = ("gate_proj", "up_proj", "down_proj")
    single = softmax_moe.single_table(config, inner, "mlp", names)
    return [decoder | single, decoder | softmax_moe.fused_table(config, inner)]


def _check_sparse(config: Config) -> None:
    """Raise UserError for a model with layers that have no experts: plans are for all layers."""
    for key, all_sparse in (("mlp_only_layers", ([], None)), ("decoder_sparse_step", (1,))):
        if config.get(key, all_sparse[0]) not in all_sparse:
            raise UserError(
                f"config.json: {key} = {config[key]!r} gives this model layers without experts, "
                f"which is not supported; allowed: {all_sparse[0]!r}"
            )


FAMILY = softmax_moe.family(
    "qwen3_moe", _tensor_tables, normalised=lambda model: model.config.norm_topk_prob
)
