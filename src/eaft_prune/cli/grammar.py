"""Values as Hydra's override grammar reads them back."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any


def written(value: Any) -> str:
    """A setting's value as the right side of an override: parsed and resolved, it is the value."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case int() | float():
            return repr(value)
        case str():
            return quoted(value)
        case Mapping():
            pairs = (f"{_key(str(key))}: {written(item)}" for key, item in value.items())
            return "{" + ", ".join(pairs) + "}"
    return "[" + ", ".join(map(written, value)) + "]"


def quoted(text: str) -> str:
    """A text that is to be taken as it stands: no interpolation, no sweep."""
    return _in_quotes(literal(text))


def literal(text: str) -> str:
    """A text as OmegaConf has to hold it, so that it is read as it stands."""
    # it resolves ${...} unless the $ is escaped, and halves the backslashes before it
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)


def as_typed(text: str) -> str:
    """What a user typed where the grammar wants quotes; ${...} in it remains an interpolation."""
    if text[:1] == "{" and text[-1:] == "}":
        pairs = [pair.partition(":") for pair in text[1:-1].split(",")]
        return "{" + ", ".join(f"{k.strip()}: {_in_quotes(v.strip())}" for k, _, v in pairs) + "}"
    if text[:1] == "[" and text[-1:] == "]":
        return "[" + ", ".join(_in_quotes(item.strip()) for item in text[1:-1].split(",")) + "]"
    return _in_quotes(text)


def _in_quotes(text: str) -> str:
    # backslashes are themselves but before a quote
    return "'" + re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), text) + "'"


def _key(text: str) -> str:
    return re.sub(r"([\\()\[\]{}:=,\s])", r"\\\1", text)
