"""A pruned model inside the resident one: routers with the rows of kept experts only.

Routers of any formula are exact by construction: they are those of the pruned model. What they
choose among the kept experts is mapped back to ids of all where the experts are run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from eaft_prune.checkpoints.families.base import check_plan
from eaft_prune.checkpoints.families.building import build
from eaft_prune.checkpoints.families.meta import groups_of, is_experts, with_count
from eaft_prune.checkpoints.token_tables import remapped
from eaft_prune.core.types import KeepPlan

if TYPE_CHECKING:
    import torch

KEPT = "eaft_kept"  # attribute of an experts module: old id of each new one
_CHANGED = "eaft_changed"  # attribute of a masked model: what its routers were
_SMALLER = "eaft_smaller"  # attribute of a model that was masked: it with fewer experts, by number
_ABSENT = object()

_Change = tuple[dict[str, Any], str, Any]  # of an object's attributes: the one that was there


@contextmanager
def masked(model: torch.nn.Module, plan: KeepPlan) -> Iterator[None]:
    """Inside, the model is the one that an export with this plan holds."""
    import torch

    paths = [name for name, module in model.named_modules() if is_experts(module)]
    settings: Any = model.config
    count = _count(model.get_submodule(paths[0]))
    check_plan(plan, len(paths), count, groups_of(settings.get_text_config()))
    # the model with n experts, on the meta device: made once, as searches mask thousands of times
    pruned = vars(model).setdefault(_SMALLER, {})
    for n in {len(ids) for ids in plan.kept} - pruned.keys():
        pruned[n] = build(with_count(settings, n))
    undo: list[_Change] = []

    def put(where: dict[str, Any], key: str, value: Any) -> None:
        undo.append((where, key, where.get(key, _ABSENT)))
        _set(where, key, value)

    try:
        for where, key, original in reversed(vars(model).get(_CHANGED, [])):
            put(where, key, original)  # a mask around this one
        whole = len(undo)
        for path, kept in zip(paths, plan.kept, strict=True):
            experts: Any = model.get_submodule(path)
            block = path.rpartition(".")[0]
            smaller = pruned[len(kept)].get_submodule(block)
            _slice(model.get_submodule(block), smaller, experts, kept, put)
            put(vars(experts), KEPT, torch.tensor(kept, device=experts.down_proj.device))
        put(vars(model), _CHANGED, undo[whole:])
        yield
    finally:
        for change in reversed(undo):
            _set(*change)


def _count(experts: Any) -> int:
    return len(experts.down_proj)


def _set(where: dict[str, Any], key: str, value: Any) -> None:
    if value is _ABSENT:
        where.pop(key, None)
    else:
        where[key] = value


def _slice(block: Any, smaller: Any, experts: Any, kept: Sequence[int], put: Any) -> None:
    """Give every module of a block but its experts the rows and counts that the smaller one has."""
    inside = set(experts.modules())
    for path, module in block.named_modules():
        if module in inside:
            continue
        mirror = smaller.get_submodule(path)
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is None:
                    continue
                shape = getattr(mirror, name).shape
                if not tensor.is_floating_point():
                    put(held, name, _table(tensor, kept))
                elif shape != tensor.shape:
                    put(held, name, _rows(tensor, shape, kept))
        for name, value in vars(mirror).items():
            differs = type(value) is int and value != vars(module).get(name)
            if differs or (name == "config" and "config" in vars(module)):
                put(vars(module), name, value)


def _table(tensor: torch.Tensor, kept: Sequence[int]) -> torch.Tensor:
    import torch

    return torch.from_numpy(remapped(tensor.cpu().numpy(), kept)).to(tensor.device)


def _rows(tensor: torch.Tensor, shape: Sequence[int], kept: Sequence[int]) -> Any:
    """The kept experts' rows, and those that are no expert's and come after them."""
    import torch

    (axis,) = (
        i for i, (old, new) in enumerate(zip(tensor.shape, shape, strict=True)) if old != new
    )
    more = shape[axis] - len(kept)
    rows = [*kept, *range(tensor.shape[axis] - more, tensor.shape[axis])]
    sliced = tensor.data.index_select(axis, torch.tensor(rows, device=tensor.device))
    return torch.nn.Parameter(sliced, False) if isinstance(tensor, torch.nn.Parameter) else sliced
