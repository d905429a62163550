"""Ragged plans in checkpoints of one expert count: filled up with experts never routed to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from eaft_prune.checkpoints.cut import router_biases
from eaft_prune.checkpoints.families.base import Family
from eaft_prune.checkpoints.read import ModelFiles, tensor_bytes
from eaft_prune.core.types import KeepPlan, UserError

_MINUS_INFINITY = {"BF16": b"\x80\xff", "F16": b"\x00\xfc", "F32": b"\x00\x00\x80\xff"}


def padded(plan: KeepPlan) -> KeepPlan:
    """Every layer filled up to the largest with the dropped experts of lowest id."""
    most = max(len(ids) for ids in plan.kept)
    layers = []
    for ids in plan.kept:
        dropped = [expert for expert in range(plan.n_experts) if expert not in ids]
        layers.append(tuple(sorted([*ids, *dropped[: most - len(ids)]])))
    return KeepPlan(tuple(layers), plan.n_experts)


def check_switches(family: Family, files: ModelFiles) -> tuple[str, ...]:
    """Per layer the router's bias; raises UserError for a family whose routers have none."""
    names = router_biases(family, files)
    if names is None:
        raise UserError(
            f"export.pad_ragged = true: routers of {family.model_type} have no bias to switch "
            "experts off with; use pruning.selection=uniform, or eval.candidates=[masked]"
        )
    return names


def with_routers_off(
    source: ModelFiles, biases: Sequence[str], plan: KeepPlan, scratch: Path
) -> ModelFiles:
    """`source` with router biases, one a layer, of -inf for the experts outside the plan.

    The changed biases are added to the file `scratch`, and their entries point there.
    """
    tensors = dict(source.tensors)
    with scratch.open("ab") as file:
        for layer, kept in enumerate(plan.kept):
            entry = tensors[biases[layer]]
            infinity = _MINUS_INFINITY[entry.dtype]
            bias = b"".join(tensor_bytes(source, entry.name))
            size = len(infinity)
            rows = [
                bias[i * size : (i + 1) * size] if i in kept else infinity
                for i in range(plan.n_experts)
            ]
            tensors[entry.name] = replace(entry, file=str(scratch.resolve()), start=file.tell())
            file.write(b"".join(rows))
    return replace(source, tensors=tensors)
