"""What qwen3_moe and mixtral have in common: routers without a bias that softmax over all experts,
and experts stored one by one (as on the hub) or fused (as transformers 5 holds them).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from eaft_prune.checkpoints.families.base import (
    Config,
    Family,
    Table,
    TensorSpec,
    check_plan,
    experts,
    layers,
    plain,
    positive,
)
from eaft_prune.core.types import KeepPlan, UserError

if TYPE_CHECKING:
    import torch

_COUNTS = ("num_experts", "num_local_experts")  # transformers 5 writes the second for both families

Routed = tuple["torch.Tensor", "torch.Tensor", "torch.Tensor"]  # logits [N, E], weights, ids [N, K]


def family(
    model_type: str,
    tensor_tables: Callable[[Config], list[Table]],
    normalised: Callable[[Any], bool],
) -> Family:
    """A family of this kind; normalised: whether a model makes router weights sum to 1."""
    return Family(
        model_type=model_type,
        n_layers=n_layers,
        n_experts=n_experts,
        top_k=top_k,
        tensor_tables=tensor_tables,
        patch_config=patch_config,
        load_arguments=load_arguments,
        experts=experts,
        masked=lambda model, plan: _masked(model, plan, normalised(model)),
    )


def n_layers(config: Config) -> int:
    return positive(config, "num_hidden_layers")


def n_experts(config: Config) -> int:
    """Experts a layer; raises UserError where the two names of the count disagree."""
    counts = {positive(config, key) for key in _COUNTS if key in config}
    if len(counts) != 1:
        values = ", ".join(f"{key} = {config.get(key)!r}" for key in _COUNTS)
        raise UserError(f"config.json: {values}: one number of experts is wanted")
    return counts.pop()


def top_k(config: Config) -> int:
    return positive(config, "num_experts_per_tok")


def patch_config(config: Config, keep_n: int) -> dict[str, Any]:
    return {key: keep_n if key in _COUNTS else value for key, value in config.items()}


def load_arguments(config: Config) -> dict[str, Any]:
    # what `eval.top_k` changes; otherwise what config.json says anyway
    return {"num_experts_per_tok": top_k(config)}


def decoder_table(config: Config, attention_bias: bool) -> dict[str, TensorSpec]:
    """Every tensor that is no router's and no expert's."""
    hidden, vocab = positive(config, "hidden_size"), positive(config, "vocab_size")
    head = head_dim(config)
    queries = positive(config, "num_attention_heads") * head
    keys = positive(config, "num_key_value_heads") * head
    table = {
        "model.embed_tokens.weight": plain(vocab, hidden),
        "model.norm.weight": plain(hidden),
    }
    if not config.get("tie_word_embeddings", False):
        table["lm_head.weight"] = plain(vocab, hidden)
    for prefix in prefixes(config):
        for name in ("input_layernorm", "post_attention_layernorm"):
            table[f"{prefix}{name}.weight"] = plain(hidden)
        for name, rows, columns in (
            ("q_proj", queries, hidden),
            ("k_proj", keys, hidden),
            ("v_proj", keys, hidden),
            ("o_proj", hidden, queries),
        ):
            table[f"{prefix}self_attn.{name}.weight"] = plain(rows, columns)
            if attention_bias:
                table[f"{prefix}self_attn.{name}.bias"] = plain(rows)
    return table


def head_dim(config: Config) -> int:
    if config.get("head_dim") is not None:
        return positive(config, "head_dim")
    return positive(config, "hidden_size") // positive(config, "num_attention_heads")


def prefixes(config: Config) -> list[str]:
    """What the names of each layer's tensors begin with."""
    return [f"model.layers.{layer}." for layer in range(n_layers(config))]


def fused_table(config: Config, inner: int) -> dict[str, TensorSpec]:
    """Routers and experts with all experts of a layer in one tensor; gate rows before up rows."""
    hidden, count = positive(config, "hidden_size"), n_experts(config)
    table = {}
    for prefix in prefixes(config):
        for name, *shape in (
            ("gate.weight", hidden),
            ("experts.gate_up_proj", 2 * inner, hidden),
            ("experts.down_proj", hidden, inner),
        ):
            table[f"{prefix}mlp.{name}"] = TensorSpec(None, (count, *shape), per_expert=True)
    return table


def single_table(
    config: Config, inner: int, block: str, names: tuple[str, str, str]
) -> dict[str, TensorSpec]:
    """Routers and experts with three tensors an expert, called `names`: gate, up and down."""
    hidden, count = positive(config, "hidden_size"), n_experts(config)
    shapes = ((inner, hidden), (inner, hidden), (hidden, inner))
    table = {}
    for prefix in prefixes(config):
        router = f"{prefix}{block}.gate.weight"
        table[router] = TensorSpec(None, (count, hidden), per_expert=True)
        for expert in range(count):
            for name, shape in zip(names, shapes, strict=True):
                tensor = f"{prefix}{block}.experts.{expert}.{name}.weight"
                table[tensor] = TensorSpec(None, shape, per_expert=False, expert=expert)
    return table


@contextmanager
def _masked(model: torch.nn.Module, plan: KeepPlan, normalised: bool) -> Iterator[None]:
    """Inside, dropped experts' router logits are -inf before the softmax over all experts.

    Exact: a probability of 0 is never among the top k, and the softmax over the kept logits is that
    of a router without the dropped rows. normalised: router weights are made to sum to 1.
    """
    routers = [layer.mlp.gate for layer in layers(model)]
    check_plan(plan, len(routers), routers[0].num_experts)
    handles = []
    try:
        for router, kept in zip(routers, plan.kept, strict=True):
            handles.append(router.register_forward_hook(_rerouted(kept, normalised)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _rerouted(kept: Sequence[int], normalised: bool) -> Callable[[Any, Any, Routed], Routed]:
    """A forward hook that routes again, among `kept`."""

    def hook(router: Any, args: Any, out: Routed) -> Routed:
        logits, weights, _ = out
        left = logits.new_full(logits.shape, float("-inf"))
        left[:, list(kept)] = logits[:, list(kept)]
        top, ids = left.float().softmax(dim=-1).topk(router.top_k, dim=-1)
        if normalised:
            top = top / top.sum(dim=-1, keepdim=True)
        return left, top.to(weights.dtype), ids

    return hook
