"""What a family says of its checkpoints and modules."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from eaft_prune.checkpoints.formats.base import Format
from eaft_prune.checkpoints.read import INPUT, OUTPUT, ModelFiles
from eaft_prune.checkpoints.slice import Slices
from eaft_prune.core.text import shortened
from eaft_prune.core.types import KeepPlan, UserError

if TYPE_CHECKING:
    import torch

Config = Mapping[str, Any]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TensorSpec:
    """What a tensor must look like, and which experts it holds."""

    dtype: str | None  # None: any float
    shape: tuple[int, ...]
    per_expert: bool  # axis 0 is the expert axis
    expert: int | None = None  # it holds this one alone, and has `.experts.<id>.` in its name


Table = Mapping[str, TensorSpec]


@dataclass(frozen=True)
class Family:
    """Everything that is different from one MoE architecture to the next."""

    model_type: str
    n_layers: Callable[[Config], int]
    n_experts: Callable[[Config], int]
    top_k: Callable[[Config], int]
    tensor_tables: Callable[[Config], list[Table]]  # one a layout in which checkpoints come
    patch_config: Callable[[Config, int], dict[str, Any]]  # config, keep_n
    load_arguments: Callable[[Config], dict[str, Any]]  # of from_pretrained
    experts: Callable[[torch.nn.Module], list[torch.nn.Module]]  # per layer
    masked: Callable[[torch.nn.Module, KeepPlan], AbstractContextManager[None]]
    router_bias: Callable[[int], str] | None = None  # of a layer; None: routers have no bias


def table_of(family: Family, model: ModelFiles) -> Table:
    """What every tensor of the checkpoint must look like, by name.

    The family's, and what is stored although loaders make it themselves: frequencies of rotary
    embeddings, and an output embedding that is tied to the input's.
    """
    table = _layout(family, model)
    return {**table, **_made_by_loaders(model, table)}


def _layout(family: Family, model: ModelFiles) -> Table:
    """The family's table in the layout that has most names in common with the checkpoint."""
    tables = family.tensor_tables(model.config)
    return max(tables, key=lambda table: len(table.keys() & model.tensors.keys()))


def _made_by_loaders(model: ModelFiles, table: Table) -> dict[str, TensorSpec]:
    made = {
        name: plain(*entry.shape)
        for name, entry in model.tensors.items()
        if name.endswith(".rotary_emb.inv_freq")
    }
    if OUTPUT in model.tensors and OUTPUT not in table and INPUT in table:
        made[OUTPUT] = table[INPUT]
    return made


def check_tensors(family: Family, model: ModelFiles) -> None:
    """Raise UserError unless the checkpoint holds exactly the family's tensors in their shapes."""
    _check_counts(family, model)
    layout = _layout(family, model)
    made = _made_by_loaders(model, layout)
    table = {**layout, **made}
    missing = sorted(set(table) - set(model.tensors))
    if missing:
        _check_quantised(family, model)
        raise UserError(f"{model.path}: tensors are missing: {_some(missing)}")
    unknown = sorted(set(model.tensors) - set(table))
    if unknown:
        raise UserError(
            f"{model.path}: no rule for the tensors {_some(unknown)} in a {family.model_type} model"
        )
    for name, spec in table.items():
        entry = model.tensors[name]
        if entry.shape != spec.shape:
            raise UserError(
                f"{model.path}: tensor {name} has shape {list(entry.shape)}, config.json asks for "
                f"{list(spec.shape)}"
            )
        if (spec.dtype or "float") != (entry.dtype if spec.dtype else _kind(entry.dtype)):
            raise UserError(
                f"{model.path}: tensor {name} is {entry.dtype}, expected {spec.dtype or 'a float'}"
            )
    if made:
        log.info("%s stores what loaders make, copied as it is: %s", model.path, _some([*made]))


def _check_counts(family: Family, model: ModelFiles) -> None:
    """Raise UserError where the table of what config.json asks for would only fill the memory.

    Every layer has tensors of its own, every expert bytes.
    """
    layers, experts = family.n_layers(model.config), family.n_experts(model.config)
    if layers > len(model.tensors) or layers * experts > model.weight_bytes:
        raise UserError(
            f"{model.path / 'config.json'} asks for {shortened(str(layers))} layers of "
            f"{shortened(str(experts))} experts, more than its weights hold"
        )


def _check_quantised(family: Family, model: ModelFiles) -> None:
    """Raise UserError where config.json says of plain experts that they are quantised."""
    key = "quantization_config"
    plain_config = {name: value for name, value in model.config.items() if name != key}
    if plain_config == model.config:
        return
    plain_files = replace(model, config=plain_config)
    if not set(table_of(family, plain_files)) - set(model.tensors):
        method = (model.config[key] or {}).get("quant_method")
        raise UserError(
            f"{model.path / 'config.json'}: {key} says {method}, but the weights are plain floats: "
            f"remove {key}"
        )


def check_plan(plan: KeepPlan, n_layers: int, n_experts: int) -> None:
    """Raise UserError unless the plan is for a model of these sizes."""
    if (len(plan.kept), plan.n_experts) != (n_layers, n_experts):
        raise UserError(
            f"the plan is for {len(plan.kept)} layers of {plan.n_experts} experts, the model has "
            f"{n_layers} of {n_experts}"
        )


def renumbered(family: Family, model: ModelFiles, plan: KeepPlan) -> ModelFiles:
    """The checkpoint less the tensors of dropped experts, those of kept ones under their new ids.

    Only of layouts in which an expert has tensors of its own; the others are cut by `slices_of`.
    """
    check_plan(plan, family.n_layers(model.config), family.n_experts(model.config))
    table = table_of(family, model)
    new_ids = [{old: new for new, old in enumerate(ids)} for ids in plan.kept]
    tensors = {}
    for name, entry in model.tensors.items():
        old = table[name].expert
        if old is None:
            tensors[name] = entry
        elif old in (ids := new_ids[_layer_of(name)]):
            renamed = name.replace(f".experts.{old}.", f".experts.{ids[old]}.")
            tensors[renamed] = replace(entry, name=renamed)
    return replace(model, tensors=tensors)


def slices_of(family: Family, model: ModelFiles, plan: KeepPlan) -> Slices:
    """For every tensor of a renumbered checkpoint the expert ids to keep, or None to copy it."""
    check_plan(plan, family.n_layers(model.config), family.n_experts(model.config))
    table = table_of(family, model)
    return {
        name: plan.kept[_layer_of(name)] if table[name].per_expert else None
        for name in model.tensors
    }


def owners_of(family: Family, model: ModelFiles, plan: KeepPlan) -> dict[str, tuple[int, int]]:
    """New and old id of the one expert that a tensor of a renumbered checkpoint holds."""
    specs = table_of(family, model).items()
    return {
        name: (spec.expert, plan.kept[_layer_of(name)][spec.expert])
        for name, spec in specs
        if spec.expert is not None and name in model.tensors
    }


def plain(*shape: int) -> TensorSpec:
    """A tensor of any float that holds no expert."""
    return TensorSpec(None, shape, per_expert=False)


def stored(projection: str, form: Format, sizes: tuple[int, int, int]) -> dict[str, TensorSpec]:
    """The tensors that hold a projection of all experts; sizes: experts, outputs, inputs."""
    return {
        name: TensorSpec(part.dtype, part.shape(*sizes), per_expert=True)
        for name, part in zip(form.names(projection), form.parts, strict=True)
    }


def layers(model: torch.nn.Module) -> list[Any]:
    return list(model.get_submodule("model.layers").children())


def experts(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [layer.mlp.experts for layer in layers(model)]


def positive(config: Config, key: str) -> int:
    """A positive integer of config.json."""
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"config.json: {key} = {shortened(repr(value))} is not a positive integer")
    return value


def _layer_of(name: str) -> int:
    return int(name.split(".layers.")[1].split(".")[0])


def _kind(dtype: str) -> str:
    return "float" if dtype in ("BF16", "F16", "F32") else dtype


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
