"""What of a model depends on its number of experts, asked of transformers on the meta device.

The model is built twice, with E and with 2E experts: what differs is the experts'. So no router's
formula, no tensor's name and no shape has to be known here.
"""

from __future__ import annotations

import copy
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from eaft_prune.checkpoints.families.building import Config, build, built
from eaft_prune.core.types import UserError

if TYPE_CHECKING:
    import torch

# how config.json calls the experts of a layer, those of a token, and groups of experts
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
CHOSEN = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "top_k_experts",
    "moe_topk",
    "moe_k",
)
_GROUPS = ("n_group", "num_expert_group")
# what config.json holds besides the language model
OTHERS = ("vision_config", "audio_config", "speech_config", "quantization_config")


@dataclass(frozen=True)
class Layer:
    """A layer with experts: its number in the model, and where its experts and their block are."""

    number: int
    experts: str  # path of the module
    block: str  # path of the module that holds routers and experts


@dataclass(frozen=True)
class Anatomy:
    """A model's layers with experts, and the tensors that have a row an expert."""

    n_experts: int
    top_k: int
    groups: int  # of which the router chooses some first; 1: none
    groups_chosen: int
    layers: tuple[Layer, ...]
    depth: int  # layers with experts or without
    language: Mapping[str, Any]  # settings of the language model alone
    # tensor in memory that has a row an expert -> which of `layers` it belongs to, and the axis of
    # the experts; along it may lie more rows, after theirs
    rows: Mapping[str, tuple[int, int]]
    # tensor in memory that lists the experts of every token of the vocabulary -> which of `layers`
    tables: Mapping[str, int]

    @property
    def least(self) -> int:
        """The fewest experts a layer that routers work with.

        Those that choose groups first do so by the best two of each (DeepSeek-V3, section 2.1.2).
        """
        if self.groups == 1:
            return self.top_k
        return self.groups * max(2, -(-self.top_k // self.groups_chosen))


def anatomy(config: Config) -> Anatomy:
    """Of the model that a config.json describes; raises UserError where it has no experts."""
    return _anatomy(json.dumps(config, sort_keys=True))


@lru_cache(maxsize=16)
def _anatomy(config_json: str) -> Anatomy:
    config = json.loads(config_json)
    _check_one_count(config)
    model = built(config)
    settings: Any = model.config
    modules = {name: module for name, module in model.named_modules() if is_experts(module)}
    kind = settings.model_type
    if not modules:
        raise UserError(
            f"config.json: model_type = {kind!r}: transformers runs no experts of this model "
            "through its experts interface, so none can be profiled or dropped"
        )
    counts = counts_of(model)
    if len(counts) > 1:
        raise UserError(
            f"config.json: model_type = {kind!r}: layers with {sorted(counts)} experts; one number "
            "for all is wanted"
        )
    (count,) = counts
    _check_kind(kind, model, modules)
    axes = _axes(model, build(with_count(settings, 2 * count)), count)
    layers = tuple(_layer(name) for name in modules)
    text = settings.get_text_config()
    tables = {}
    for path, tensor in tensors(model):
        layer = _layer_of(path, layers)
        if layer is not None and not tensor.is_floating_point():
            if tensor.shape != (text.vocab_size, chosen(text)):
                raise UserError(
                    f"config.json: model_type = {kind!r}: {path} of shape {list(tensor.shape)} is "
                    "no table of the experts of every token: such layers cannot be pruned"
                )
            tables[path] = layer
    rows = {}
    for name, axis in axes.items():
        layer = _layer_of(name, layers)
        assert layer is not None, f"{name} belongs to no layer with experts"
        rows[name] = layer, axis
    return Anatomy(
        count,
        chosen(text),
        groups_of(text),
        getattr(text, "topk_group", None) or 1,
        layers,
        text.num_hidden_layers,
        text.to_dict(),
        rows,
        tables,
    )


def _check_kind(kind: str, model: Any, experts: Iterable[str]) -> None:
    """Raise UserError for a model whose parts are not those that are profiled here."""
    numbers = Counter(_layer(path).number for path in experts)
    if twice := [number for number, count in numbers.items() if count > 1]:
        raise UserError(
            f"config.json: model_type = {kind!r}: layer {twice[0]} holds several groups of "
            "experts, of which text routes to one alone: what the others do cannot be profiled"
        )
    if model.base_model is model:
        raise UserError(
            f"config.json: model_type = {kind!r}: transformers gives no last hidden states of this "
            "model, only its logits: prune the language model inside as a checkpoint of its own"
        )


def _check_one_count(config: Config) -> None:
    """Raise UserError where two names of the count disagree, wherever config.json nests them."""
    counts = {key: config[key] for key in COUNTS if isinstance(config.get(key), int)}
    if len(set(counts.values())) > 1:
        values = ", ".join(f"{key} = {value}" for key, value in counts.items())
        raise UserError(f"config.json: {values}: one number of experts is wanted")
    for key, value in config.items():
        if isinstance(value, dict) and key not in OTHERS:
            _check_one_count(value)


def counts_of(model: torch.nn.Module) -> set[int]:
    """Numbers of experts that its layers have."""
    experts: list[Any] = [module for module in model.modules() if is_experts(module)]
    return {len(module.down_proj) for module in experts}


def with_count(settings: Any, count: int) -> Any:
    """A copy of transformers' settings with another number of experts."""
    changed = copy.deepcopy(settings)
    text = changed.get_text_config()
    for key in COUNTS:
        value = getattr(text, key, None)
        if isinstance(value, int) and not isinstance(value, bool):
            setattr(text, key, count)
    return changed


def chosen(text: Any) -> int:
    """Experts a token, of the settings of the language model."""
    for key in CHOSEN:
        value = getattr(text, key, None)
        if isinstance(value, int):
            return value
        if isinstance(value, list) and len(set(value)) == 1:
            return int(value[0])
    raise UserError(f"config.json gives none of {', '.join(CHOSEN)}: experts a token")


def groups_of(text: Any) -> int:
    """Groups of experts among which routers choose first, of the language model's settings."""
    return next((value for key in _GROUPS if (value := getattr(text, key, None))), 1)


def is_experts(module: Any) -> bool:
    """Whether transformers runs it through its experts interface."""
    return hasattr(module, "_apply_gate") and hasattr(module, "is_transposed")


def _axes(model: Any, twice: Any, count: int) -> dict[str, int]:
    """Per tensor that grows with the experts the axis along which it does."""
    axes = {}
    larger = dict(tensors(twice))
    for name, tensor in tensors(model):
        grown = [
            axis
            for axis, (size, other) in enumerate(zip(tensor.shape, larger[name].shape, strict=True))
            if size != other
        ]
        if not grown:
            continue
        if len(grown) > 1 or larger[name].shape[grown[0]] - tensor.shape[grown[0]] != count:
            raise UserError(
                f"tensor {name} has no row an expert: it grows from {list(tensor.shape)} to "
                f"{list(larger[name].shape)} with twice as many"
            )
        axes[name] = grown[0]
    return axes


def tensors(model: Any) -> list[tuple[str, torch.Tensor]]:
    """Parameters and buffers, stored or not."""
    return [*model.named_parameters(), *model.named_buffers()]


def _layer_of(name: str, layers: Sequence[Layer]) -> int | None:
    """Which layer's block holds a tensor, the experts' among them; None: that of none."""
    inside = (index for index, layer in enumerate(layers) if name.startswith(f"{layer.block}."))
    return next(inside, None)


def _layer(experts: str) -> Layer:
    numbers = re.findall(r"\.layers\.(\d+)\.", f".{experts}")
    return Layer(int(numbers[-1]), experts, experts.rpartition(".")[0])
