"""Every other MoE that transformers loads, as transformers itself describes it.

Which tensors a checkpoint must hold, what they become in memory, and which of their rows belong to
which expert: its own model classes and conversion rules are asked, nothing is listed here.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from eaft_prune.checkpoints.families import sliced_routers, stored
from eaft_prune.checkpoints.families.base import (
    Config,
    Family,
)
from eaft_prune.checkpoints.families.building import auto_class, build, built, config_of
from eaft_prune.checkpoints.families.meta import (
    CHOSEN,
    COUNTS,
    OTHERS,
    anatomy,
    counts_of,
    is_experts,
)
from eaft_prune.checkpoints.formats.matrices import matrices
from eaft_prune.checkpoints.packed_matrices import decoded
from eaft_prune.checkpoints.read import open_model
from eaft_prune.core.types import UserError

if TYPE_CHECKING:
    import torch

# how config.json counts layers that predict tokens after the next
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
        table=stored.table,
        patch_config=_patch_config,
        with_top_k=_with_top_k,
        load=_load,
        experts=_experts,
        masked=sliced_routers.masked,
    )


def _patch_config(config: Config, keep_n: int) -> dict[str, Any]:
    count = anatomy(config).n_experts
    patched = _replaced(config, COUNTS, count, keep_n)
    if keep_n != count:
        for key in _FURTHER:
            patched = _replaced(patched, (key,), None, 0)
    if counts_of(built(patched)) != {keep_n}:
        raise UserError(
            f"config.json gives the {count} experts under none of {', '.join(COUNTS)}: add the one "
            f"that a {config['model_type']} model reads"
        )
    return patched


def _with_top_k(config: Config, top_k: int) -> dict[str, Any]:
    kind = anatomy(config)
    if kind.tables:
        raise UserError(
            f"eval.top_k = {top_k}: layers of this model list the {kind.top_k} experts of every "
            "token in a table; leave it null"
        )
    return _replaced(config, CHOSEN, kind.top_k, top_k)


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
    files = open_model(path)
    packed = matrices(files.tensors)
    if packed:
        bare: Any = build(settings)  # of the class that it finds for itself where it has a path
        return type(bare).from_pretrained(
            None,
            config=bare.config,
            state_dict=decoded(files, packed),
            local_files_only=True,
            trust_remote_code=False,
            **arguments,
        )
    return auto_class(settings).from_pretrained(
        path, config=settings, local_files_only=True, trust_remote_code=False, **arguments
    )


def _experts(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [module for module in model.modules() if is_experts(module)]
