"""Every other MoE that transformers loads, as transformers itself describes it.

Which tensors a checkpoint must hold, what they become in memory, and which of their rows belong to
which expert: its own model classes and conversion rules are asked, nothing is listed here.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eaft_prune.checkpoints.families import sliced_routers
from eaft_prune.checkpoints.families.base import (
    Config,
    Family,
    Table,
    TensorSpec,
    some,
)
from eaft_prune.checkpoints.families.meta import (
    CHOSEN,
    COUNTS,
    OTHERS,
    Anatomy,
    anatomy,
    auto_class,
    build,
    config_of,
    is_experts,
    tensors,
)
from eaft_prune.checkpoints.families.table import check_counts, made_by_loaders
from eaft_prune.checkpoints.read import ModelFiles
from eaft_prune.core.quiet import quiet
from eaft_prune.core.types import UserError

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

_OWN = re.compile(r"\.experts\.(\d+)\.")  # in the name of a tensor of one expert
_LAYER = re.compile(r"\.layers\.(\d+)\.")
_FURTHER = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers")


def family(config: Config) -> Family:
    """The family of a checkpoint; raises UserError where transformers has none with experts."""
    kind = anatomy(config)  # raises early
    assert kind.layers, "a model with experts has layers that hold them"
    return Family(
        model_type=str(config["model_type"]),
        n_layers=lambda config: len(anatomy(config).layers),
        n_experts=lambda config: anatomy(config).n_experts,
        top_k=lambda config: anatomy(config).top_k,
        groups=lambda config: anatomy(config).groups,
        least=lambda config: anatomy(config).least,
        layer_numbers=lambda config: tuple(layer.number for layer in anatomy(config).layers),
        language=lambda config: anatomy(config).language,
        table=_table,
        patch_config=_patch_config,
        with_top_k=lambda config, top_k: _replaced(config, CHOSEN, anatomy(config).top_k, top_k),
        load=_load,
        experts=_experts,
        masked=sliced_routers.masked,
    )


def _table(files: ModelFiles) -> Table:
    kind = anatomy(files.config)
    check_counts(files, len(kind.layers), kind.n_experts)
    model: Any = build(config_of(files.config))
    held = dict(tensors(model))
    made = made_by_loaders(files, {})
    names = [name for name in files.tensors if name not in made]
    targets = _targets(model, names, held)
    _check_experts(files, targets, kind)
    ignored = _check_loading(files, model, names)
    table = dict(made)
    for name, (target, converted) in targets.items():
        shape = files.tensors[name].shape
        if target not in held or name in ignored:
            table[name] = TensorSpec(None, shape, further=_is_further(name, kind))
        else:
            table[name] = _spec(kind, name, target, shape, converted)
    return table


def _check_experts(
    files: ModelFiles, targets: Mapping[str, tuple[str, bool]], kind: Anatomy
) -> None:
    """Raise UserError unless experts with tensors of their own are all there, in one shape."""
    found: dict[tuple[str, str], dict[int, str]] = {}
    for name, (target, converted) in targets.items():
        own = _OWN.search(name)
        if converted and own and target in kind.axes:
            stem = name[: own.start(1)], name[own.end(1) :]
            found.setdefault(stem, {})[int(own[1])] = name
    for (before, after), names in found.items():
        wanted = range(kind.n_experts)
        if missing := [f"{before}{i}{after}" for i in wanted if i not in names]:
            raise UserError(f"{files.path}: tensors are missing: {some(missing)}")
        if unknown := [name for i, name in names.items() if i not in wanted]:
            raise UserError(f"{files.path}: no rule for the tensors {some(unknown)}")
        shapes = Counter(files.tensors[name].shape for name in names.values())
        ((usual, _),) = shapes.most_common(1)
        for name in names.values():
            if (shape := files.tensors[name].shape) != usual:
                raise UserError(
                    f"{files.path}: tensor {name} has shape {list(shape)}, other experts' have "
                    f"{list(usual)}"
                )


def _check_loading(files: ModelFiles, model: Any, names: list[str]) -> set[str]:
    """Names that transformers knows to leave aside; UserError unless it finds all others in order.

    The checkpoint is loaded as it would be, with tensors that have shapes and no bytes.
    """
    import torch

    shapes = {
        name: torch.empty(files.tensors[name].shape, dtype=torch.bfloat16, device="meta")
        for name in names
    }
    with quiet():
        _, info = type(model).from_pretrained(
            None,
            config=model.config,
            state_dict=shapes,
            output_loading_info=True,
            device_map={"": "meta"},
            ignore_mismatched_sizes=True,
        )
    where = f"a {model.config.model_type} model"
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"{files.path}: tensors are missing: {some(missing)} (of {where})")
    if unknown := sorted(info["unexpected_keys"]):
        raise UserError(f"{files.path}: no rule for the tensors {some(unknown)} in {where}")
    for name, found, wanted in sorted(info["mismatched_keys"]):
        raise UserError(
            f"{files.path}: tensor {name} has shape {list(found)}, config.json asks for "
            f"{list(wanted)}"
        )
    if errors := info["error_msgs"]:
        raise UserError(f"{files.path}: transformers cannot load it: {errors[0]}")
    patterns = [*(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or [])]
    return {name for name in names if any(re.search(pattern, name) for pattern in patterns)}


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
    axis = kind.axes.get(target)
    if axis is None:
        return TensorSpec(None, shape)
    layer = kind.layer_of(target)
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
    numbers = _LAYER.findall(f".{name}")
    behind = bool(numbers) and int(numbers[0]) > max(layer.number for layer in kind.layers)
    return name.startswith(("mtp.", "model.mtp.")) or behind


def _patch_config(config: Config, keep_n: int) -> dict[str, Any]:
    count = anatomy(config).n_experts
    patched = _replaced(config, COUNTS, count, keep_n)
    if keep_n != count:
        for key in _FURTHER:
            patched = _replaced(patched, (key,), None, 0)
    if anatomy(patched).n_experts != keep_n:
        raise UserError(
            f"config.json gives the {count} experts under none of {', '.join(COUNTS)}: add the one "
            f"that a {config['model_type']} model reads"
        )
    return patched


def _replaced(config: Config, keys: tuple[str, ...], old: int | None, new: int) -> dict[str, Any]:
    """These keys of the language model, wherever they are nested, from old (None: any) to new."""

    def value_of(key: str, value: Any) -> Any:
        if isinstance(value, dict) and key not in OTHERS:
            return _replaced(value, keys, old, new)
        if key not in keys or isinstance(value, bool):
            return value
        if isinstance(value, list) and value and all(item == old for item in value):
            return [new] * len(value)
        whole = isinstance(value, int) and old in (None, value)
        return new if whole else value

    return {key: value_of(key, value) for key, value in config.items()}


def _load(path: Path, config: Config, **arguments: Any) -> Any:
    settings = config_of(config)
    return auto_class(settings).from_pretrained(
        path, config=settings, local_files_only=True, trust_remote_code=False, **arguments
    )


def _experts(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [module for module in model.modules() if is_experts(module)]
