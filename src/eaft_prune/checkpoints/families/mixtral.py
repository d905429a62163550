"""mixtral: softmax over all experts, top k, router weights of the chosen made to sum to 1."""

from __future__ import annotations

from eaft_prune.checkpoints.families import softmax_moe
from eaft_prune.checkpoints.families.base import Config, Table, positive


def _tensor_tables(config: Config) -> list[Table]:
    inner = positive(config, "intermediate_size")
    decoder = softmax_moe.decoder_table(config, attention_bias=False)
    single = softmax_moe.single_table(config, inner, "block_sparse_moe", ("w1", "w3", "w2"))
    return [decoder | single, decoder | softmax_moe.fused_table(config, inner)]


FAMILY = softmax_moe.family("mixtral", _tensor_tables, normalised=lambda model: True)
