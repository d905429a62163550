"""mixtral: softmax over all experts, top k, gates of the chosen made to sum to 1."""

from __future__ import annotations

from functools import partial

from eaft_prune.families import softmax_moe
from eaft_prune.families.base import Config, Family, Table, positive


def _tensor_tables(config: Config) -> list[Table]:
    inner = positive(config, "intermediate_size")
    decoder = softmax_moe.decoder_table(config, attention_bias=False)
    single = softmax_moe.single_table(config, inner, "block_sparse_moe", ("w1", "w3", "w2"))
    return [decoder | single, decoder | softmax_moe.fused_table(config, inner)]


FAMILY = Family(
    model_type="mixtral",
    n_layers=softmax_moe.n_layers,
    n_experts=softmax_moe.n_experts,
    top_k=softmax_moe.top_k,
    tensor_tables=_tensor_tables,
    patch_config=softmax_moe.patch_config,
    load_arguments=softmax_moe.load_arguments,
    experts=softmax_moe.experts,
    masked=partial(softmax_moe.masked, normalised=True),
)
