"""The model that a config.json describes, built by transformers without a byte of its weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from eaft_prune.core.quiet import quiet
from eaft_prune.core.text import shortened
from eaft_prune.core.types import UserError

if TYPE_CHECKING:
    import torch

Config = Mapping[str, Any]


def config_of(config: Config) -> Any:
    """transformers' settings of what a config.json says; raises UserError where it takes it not."""
    from transformers import CONFIG_MAPPING

    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise UserError(
            f"config.json: model_type = {shortened(repr(model_type))} is not known to this version "
            "of transformers: update it, or check the name"
        )
    plain = {
        key: _with_floats(value) for key, value in config.items() if key != "quantization_config"
    }
    try:
        return CONFIG_MAPPING[model_type].from_dict(plain)
    # a class of settings raises whatever its own checks raise
    except Exception as error:
        raise UserError(
            f"config.json: {shortened(str(error).replace(chr(10), ' '), 300)}"
        ) from None


def _with_floats(value: Any) -> Any:
    """JSON with the floats in it that JSON has no way to write, as transformers tags them."""
    match value:
        case {"__float__": str(text)}:
            return float(text)
        case dict():
            return {key: _with_floats(item) for key, item in value.items()}
        case list():
            return [_with_floats(item) for item in value]
    return value


def built(config: Config) -> torch.nn.Module:
    """The model of a config.json on the meta device; the last few are kept, so change none."""
    return _built(json.dumps(config, sort_keys=True))


@lru_cache(maxsize=4)
def _built(config_json: str) -> torch.nn.Module:
    return build(config_of(json.loads(config_json)))


def build(settings: Any) -> torch.nn.Module:
    """The model on the meta device: shapes without bytes."""
    import torch

    with torch.device("meta"), quiet():
        try:
            model: torch.nn.Module = auto_class(settings).from_config(
                settings, trust_remote_code=False
            )
        # whatever a class raises for sizes that do not fit together
        except Exception as error:
            first = shortened(str(error).replace("\n", " "), 300)
            raise UserError(
                f"config.json describes no {settings.model_type} model: {first}"
            ) from None
    return model


def auto_class(settings: Any) -> Any:
    """transformers' class for language models, or for those that see, where there is only one."""
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
    )

    if type(settings) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM
    return AutoModelForImageTextToText
