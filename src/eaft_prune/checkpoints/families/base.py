"""What a family says of its checkpoints and modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from eaft_prune.checkpoints.read import ModelFiles
from eaft_prune.core.text import shortened
from eaft_prune.core.types import KeepPlan, UserError

if TYPE_CHECKING:
    import torch

Config = Mapping[str, Any]


@dataclass(frozen=True)
class TensorSpec:
    """What a tensor must look like, and which experts it holds."""

    dtype: str | None  # None: any float
    shape: tuple[int, ...]
    layer: int | None = None  # index of the layer with experts whose experts it holds, if any
    axis: int | None = None  # it holds all of them along this axis, other rows perhaps after them
    expert: int | None = None  # it holds this one alone, and has `.experts.<id>.` in its name
    ids: bool = False  # its values are ids of the layer's experts, a row a token of the vocabulary
    # of layers that predict further tokens and route to experts of their own, which no plan is for
    further: bool = False


Table = Mapping[str, TensorSpec]


@dataclass(frozen=True)
class Family:
    """Everything that is different from one MoE architecture to the next.

    Layers are those with experts, counted from 0; `layer_numbers` tells which of the model's.
    """

    model_type: str
    n_layers: Callable[[Config], int]
    n_experts: Callable[[Config], int]
    top_k: Callable[[Config], int]
    groups: Callable[[Config], int]  # of experts, of which a router chooses some first; 1: none
    least: Callable[[Config], int]  # experts a layer that its routers need
    layer_numbers: Callable[[Config], tuple[int, ...]]
    language: Callable[[Config], Config]  # what config.json says of the language model alone
    # every tensor of a checkpoint; raises UserError for one that is missing, unknown or misshapen
    table: Callable[[ModelFiles], Table]
    patch_config: Callable[[Config, int], dict[str, Any]]  # config, keep_n
    with_top_k: Callable[[Config, int], dict[str, Any]]  # config, experts a token
    load: Callable[..., Any]  # config, keywords of from_pretrained -> transformers' model
    experts: Callable[[torch.nn.Module], list[torch.nn.Module]]  # per layer
    masked: Callable[[torch.nn.Module, KeepPlan], AbstractContextManager[None]]


def with_table(family: Family, files: ModelFiles) -> ModelFiles:
    """The checkpoint with its table; raises UserError where its tensors are not the family's."""
    return replace(files, table=family.table(files))


def table_of(family: Family, files: ModelFiles) -> Table:
    """What every tensor holds: as it was checked, or by checking it now."""
    return family.table(files) if files.table is None else files.table


def check_plan(plan: KeepPlan, n_layers: int, n_experts: int, groups: int = 1) -> None:
    """Raise UserError unless the plan is for a model of these sizes.

    Where routers choose among groups of experts first, it keeps as many of each.
    """
    if (len(plan.kept), plan.n_experts) != (n_layers, n_experts):
        raise UserError(
            f"the plan is for {len(plan.kept)} layers of {plan.n_experts} experts, the model has "
            f"{n_layers} of {n_experts}"
        )
    width = n_experts // groups
    for layer, kept in enumerate(plan.kept):
        sizes = [sum(expert // width == group for expert in kept) for group in range(groups)]
        if len(set(sizes)) > 1:
            raise UserError(
                f"the plan keeps {sizes} experts of the {groups} groups of layer {layer}: routers "
                "choose among groups first, so it must keep as many of each"
            )


def positive(config: Config, key: str) -> int:
    """A positive integer of config.json."""
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"config.json: {key} = {shortened(repr(value))} is not a positive integer")
    return value


def some(names: list[str]) -> str:
    """The first names of a list, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
