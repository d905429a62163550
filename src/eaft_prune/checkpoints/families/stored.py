"""Every tensor of a checkpoint as transformers would load it: what becomes of it, whose it is."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from eaft_prune.checkpoints.families.base import Table, TensorSpec, some
from eaft_prune.checkpoints.families.building import built
from eaft_prune.checkpoints.families.meta import Anatomy, anatomy, tensors
from eaft_prune.checkpoints.families.table import check_counts, made_by_loaders
from eaft_prune.checkpoints.formats.matrices import Matrix, matrices
from eaft_prune.checkpoints.packed_matrices import shapes_of
from eaft_prune.checkpoints.read import ModelFiles
from eaft_prune.core.quiet import quiet
from eaft_prune.core.types import UserError

_OWN = re.compile(r"\.experts\.(\d+)\.")  # in the name of a tensor of one expert
_LAYER = re.compile(r"\.layers\.(\d+)\.")
_TOWERS = ("vision", "visual", "audio", "speech")  # in names of what is not the language model's
Shape = tuple[int, ...]


def table(files: ModelFiles) -> Table:
    """What each tensor holds; raises UserError for one that is missing, unknown or misshapen."""
    kind = anatomy(files.config)
    check_counts(files, len(kind.layers), kind.n_experts)
    model: Any = built(files.config)
    held = dict(tensors(model))
    made = made_by_loaders(files, {})
    packed = matrices(files.tensors)
    shapes = shapes_of(files, packed)
    shapes = {name: shape for name, shape in shapes.items() if name not in made}
    targets = _targets(model, [*shapes], held)
    _check_experts(files.path, shapes, targets, kind)
    further = {name for name in shapes if _is_further(name, kind)}
    loaded = {name: shape for name, shape in shapes.items() if name not in further}
    ignored = _check_loading(files, model, loaded)
    found = dict(made)
    for name, (target, converted) in targets.items():
        if name in further:
            spec = TensorSpec(None, shapes[name], further=True)
        elif target not in held or name in ignored:
            spec = TensorSpec(None, shapes[name])
        else:
            spec = _spec(kind, name, target, shapes[name], converted)
        if name in packed:
            found |= _of_parts(files, packed[name], spec)
        else:
            found[name] = spec
    return found


def _of_parts(files: ModelFiles, matrix: Matrix, spec: TensorSpec) -> dict[str, TensorSpec]:
    """What the tensors of a matrix hold: what the matrix does."""
    found = {}
    for name in matrix.tensors:
        shape = files.tensors[name].shape
        rows = spec.axis is not None and shape[:1] == spec.shape[:1]
        found[name] = replace(spec, shape=shape, axis=0 if rows else None)
        if spec.axis is not None and not rows and shape:
            raise UserError(
                f"tensor {name} of shape {list(shape)} is part of {matrix.name}, whose experts lie "
                "along axis 0: it is not known which rows of it are theirs"
            )
    return found


def _check_experts(
    path: Path, sizes: Mapping[str, Shape], targets: Mapping[str, tuple[str, bool]], kind: Anatomy
) -> None:
    """Raise UserError unless experts with tensors of their own are all there, in one shape."""
    found: dict[tuple[str, str], dict[int, str]] = {}
    for name, (target, converted) in targets.items():
        own = _OWN.search(name)
        if converted and own and target in kind.rows:
            stem = name[: own.start(1)], name[own.end(1) :]
            found.setdefault(stem, {})[int(own[1])] = name
    for (before, after), names in found.items():
        wanted = range(kind.n_experts)
        if missing := [f"{before}{i}{after}" for i in wanted if i not in names]:
            raise UserError(f"{path}: tensors are missing: {some(missing)}")
        if unknown := [name for i, name in names.items() if i not in wanted]:
            raise UserError(f"{path}: no rule for the tensors {some(unknown)}")
        shapes = Counter(sizes[name] for name in names.values())
        ((usual, _),) = shapes.most_common(1)
        for name in names.values():
            if (shape := sizes[name]) != usual:
                raise UserError(
                    f"{path}: tensor {name} has shape {list(shape)}, other experts' have "
                    f"{list(usual)}"
                )


def _check_loading(files: ModelFiles, model: Any, sizes: Mapping[str, Shape]) -> set[str]:
    """Names that transformers knows to leave aside; UserError unless it finds all others in order.

    The checkpoint is loaded as it would be, with tensors that have shapes and no bytes.
    """
    import torch

    shapes = {
        name: torch.empty(shape, dtype=torch.bfloat16, device="meta")
        for name, shape in sizes.items()
    }
    with quiet():
        _, info = type(model).from_pretrained(
            None,
            config=model.config,
            state_dict=shapes,
            output_loading_info=True,
            device_map={"": "meta"},
            ignore_mismatched_sizes=True,
            local_files_only=True,
            trust_remote_code=False,
        )
    where = f"a {model.config.model_type} model"
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"{files.path}: tensors are missing: {some(missing)} (of {where})")
    if unknown := sorted(info["unexpected_keys"]):
        how = (files.config.get("quantization_config") or {}).get("quant_method")
        said = f"; quantization_config says {how}" if how else ""
        raise UserError(f"{files.path}: no rule for the tensors {some(unknown)} in {where}{said}")
    for name, found, wanted in sorted(info["mismatched_keys"]):
        raise UserError(
            f"{files.path}: tensor {name} has shape {list(found)}, config.json asks for "
            f"{list(wanted)}"
        )
    if errors := info["error_msgs"]:
        raise UserError(f"{files.path}: transformers cannot load it: {errors[0]}")
    patterns = [*(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or [])]
    return {name for name in sizes if any(re.search(pattern, name) for pattern in patterns)}


def _targets(model: Any, names: list[str], held: Mapping[str, Any]) -> dict[str, tuple[str, bool]]:
    """What each stored tensor becomes in memory, and whether more than its name is changed."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        rename_source_key,
    )

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    prefix = model.base_model_prefix
    found = {}
    for name in names:
        target, pattern = rename_source_key(name, renamings, converters, prefix, held)
        if target not in held and name in held:
            target, pattern = name, None
        found[name] = target, pattern is not None
    return found


def _spec(
    kind: Anatomy, name: str, target: str, shape: tuple[int, ...], converted: bool
) -> TensorSpec:
    """Which experts a stored tensor holds, from those of what it becomes."""
    if target in kind.tables:
        return TensorSpec(None, shape, kind.tables[target], ids=True)
    if target not in kind.rows:
        return TensorSpec(None, shape)
    layer, axis = kind.rows[target]
    own = _OWN.search(name)
    if converted and own:
        return TensorSpec(None, shape, layer, expert=int(own[1]))
    if converted and shape[axis] != kind.n_experts:
        raise UserError(
            f"tensor {name} of shape {list(shape)} becomes {target}, of which axis {axis} are the "
            f"{kind.n_experts} experts: it is not known where they are in it"
        )
    return TensorSpec(None, shape, layer, axis)


def _is_further(name: str, kind: Anatomy) -> bool:
    """Whether it belongs to layers behind the last, which predict tokens after the next."""
    if name.startswith(("mtp.", "model.mtp.")):
        return True
    numbers = _LAYER.findall(f".{name}")
    language = not any(part in name for part in _TOWERS)
    return language and bool(numbers) and int(numbers[0]) >= kind.depth
