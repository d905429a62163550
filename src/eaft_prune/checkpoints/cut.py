"""What a keep plan does to a checkpoint's tensors: left out, renumbered, sliced or copied."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from eaft_prune.checkpoints.families.base import Family, TensorSpec, check_plan, table_of
from eaft_prune.checkpoints.read import ModelFiles
from eaft_prune.checkpoints.slice import Slice, Slices
from eaft_prune.core.types import KeepPlan


@dataclass(frozen=True)
class Cut:
    """A checkpoint less the tensors of dropped experts, those of kept ones under their new ids.

    slices: of every tensor the rows to keep, or None to copy it. owners: new and old id of the one
    expert that a tensor holds. tables: of experts by token, with the layer whose they are.
    """

    files: ModelFiles
    slices: Slices
    owners: Mapping[str, tuple[int, int]]
    tables: Mapping[str, int]


def cut(family: Family, files: ModelFiles, plan: KeepPlan) -> Cut:
    """The plan applied; raises UserError where it is for another model."""
    config = files.config
    groups = family.groups(config)
    check_plan(plan, family.n_layers(config), family.n_experts(config), groups)
    new_ids = [{old: new for new, old in enumerate(ids)} for ids in plan.kept]
    tensors, slices, owners = {}, dict[str, Slice | None](), dict[str, tuple[int, int]]()
    tables = {}
    table = table_of(family, files)
    for old_name, entry in files.tensors.items():  # in the order they are stored
        name, spec = old_name, table[old_name]
        if spec.further and not plan.keeps_all:
            continue
        if spec.expert is not None:
            assert spec.layer is not None, "an expert's tensor is a layer's"
            new = new_ids[spec.layer].get(spec.expert)
            if new is None:
                continue
            name = old_name.replace(f".experts.{spec.expert}.", f".experts.{new}.")
            entry = replace(entry, name=name)
            owners[name] = new, spec.expert
        if spec.ids:
            assert spec.layer is not None, "ids are of a layer's experts"
            tables[name] = spec.layer
        tensors[name] = entry
        slices[name] = _slice(spec, plan)
    return Cut(replace(files, tensors=tensors, table=None), slices, owners, tables)


def _slice(spec: TensorSpec, plan: KeepPlan) -> Slice | None:
    if spec.axis is None:
        return None
    assert spec.layer is not None, "rows of experts are a layer's"
    more = range(plan.n_experts, spec.shape[spec.axis])  # of no expert: always kept
    return Slice((*plan.kept[spec.layer], *more), spec.axis)


def router_biases(family: Family, files: ModelFiles) -> tuple[str, ...] | None:
    """Per layer the router's bias, which -inf switches an expert off with; None: there is none."""
    count, layers = family.n_experts(files.config), range(family.n_layers(files.config))
    found = [
        (spec.layer, name)
        for name, spec in table_of(family, files).items()
        if spec.axis is not None and spec.shape == (count,)
        if name.endswith("bias") and ".experts." not in name
    ]
    whole = sorted(layer for layer, _ in found if layer is not None) == [*layers]
    return tuple(name for _, name in sorted(found)) if whole else None
