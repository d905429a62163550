"""A family: OLMoE, whose routers softmax over all experts and whose queries and keys have norms."""

from eaft_prune.checkpoints.families import softmax_moe
from eaft_prune.checkpoints.families.base import plain, positive


def tensor_tables(config):
    inner, head = positive(config, "intermediate_size"), softmax_moe.head_dim(config)
    table = softmax_moe.decoder_table(config, attention_bias=False)
    for prefix in softmax_moe.prefixes(config):
        for name, heads in (("q_norm", "num_attention_heads"), ("k_norm", "num_key_value_heads")):
            table[f"{prefix}self_attn.{name}.weight"] = plain(positive(config, heads) * head)
    names = ("gate_proj", "up_proj", "down_proj")
    single = softmax_moe.single_table(config, inner, "mlp", names)
    return [table | single, table | softmax_moe.fused_table(config, inner)]


FAMILY = softmax_moe.family("olmoe", tensor_tables, lambda model: model.config.norm_topk_prob)
