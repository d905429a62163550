"""Composed settings -> one validated `Experiment`, or a line per mistake."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from eaft_prune.config.base import Settings, nearest
from eaft_prune.config.defaults import section_of
from eaft_prune.config.experiment import Experiment
from eaft_prune.config.renamed import unknown
from eaft_prune.core.types import UserError


def parse_experiment(values: Mapping[str, Any]) -> Experiment:
    """Validate composed settings; raises UserError: a line per key, value and range."""
    try:
        return Experiment.model_validate(values)
    except ValidationError as error:
        found = error.errors()
        # what holds a bad item is not a second mistake
        inner = [e for e in found if not any(_within(other, e) for other in found)]
        lines = [_one_line(dict(item), values) for item in inner]
        raise UserError("\n".join(dict.fromkeys(lines))) from None


def setting_names(section: type[Settings] = Experiment, prefix: str = "") -> list[str]:
    """Dotted names of all settings, sections included."""
    names = []
    for name, field in section.model_fields.items():
        names.append(prefix + name)
        if inner := section_of(field.annotation):
            names += setting_names(inner, f"{prefix}{name}.")
    return names


def _within(inner: Mapping[str, Any], outer: Mapping[str, Any]) -> bool:
    """Whether `inner` lies deeper in what `outer` complains of."""
    depth = len(outer["loc"])
    return len(inner["loc"]) > depth and inner["loc"][:depth] == outer["loc"]


def _one_line(error: dict[str, Any], values: Mapping[str, Any]) -> str:
    # a union's branch name (`int`, `tuple[...]`) and `dict` keys end pydantic's location: keep only
    # what is a key or index of the settings themselves
    path: list[str] = []
    node: Any = values
    for part in error["loc"]:
        inside = part in node if isinstance(node, Mapping) else isinstance(node, list)
        if inside:
            node = node[part]
        elif error["type"] not in ("missing", "extra_forbidden"):
            continue
        path.append(str(part))
    key = ".".join(path)
    key = key if key.isprintable() else repr(key)
    if error["type"] == "extra_forbidden":
        return unknown(key, nearest(key, setting_names()))
    if error["type"] == "missing":
        return f"{key} is missing: give {key}=VALUE"
    message = error["msg"].removeprefix("Value error, ")
    # a section's own validator names its keys itself
    own = isinstance(node, Mapping) and error["type"] == "value_error"
    return message if own or not key else f"{key} = {node!r}: {message}"
