"""Settings that had another name, in locks and recipes written before and on command lines."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def _confident(value: float | None) -> dict[str, Any]:
    if value is None:
        return {"early_stop": False}
    return {"early_stop": True, "early_stop_confidence": value}


# section.key -> what stands in its place in that section, if anything does
RENAMED: dict[str, Callable[[Any], dict[str, Any]]] = {
    "eval.stop": lambda value: {"early_stop": value == "decided"},
    "eval.top_logprobs": lambda value: {"kl_top_k": 64 if value else None},
    "profile.stop": lambda value: {"early_stop": value == "converged"},
    "profile.stop_first_blocks": lambda value: {"early_stop_first_blocks": value},
    "profile.stop_jaccard": lambda value: {"early_stop_agreement": value},
    "marginal.stop_confidence": _confident,
    "search.stop_confidence": _confident,
    "gate.resamples": lambda value: {},
    "gate.bootstrap_seed": lambda value: {},
    "ablate.resamples": lambda value: {},
    "ablate.seed": lambda value: {},
    "compensation.exact_unknowns": lambda value: {},
}


def renamed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a file under the names they have today."""
    found = dict(settings)
    for name, today in RENAMED.items():
        section, key = name.split(".")
        values = found.get(section)
        if isinstance(values, Mapping) and key in values:
            kept = {k: v for k, v in values.items() if k != key}
            found[section] = {**kept, **today(values[key])}
    return found


def unknown(key: str, known: str | None) -> str:
    """One line about a setting there is not; `known`: the one that was likely meant."""
    if key in RENAMED:
        section = key.split(".")[0]
        names = " and ".join(f"{section}.{name}" for name in RENAMED[key](0.95))
        return f"unknown setting {key}: " + (
            f"it is {names} now" if names else "nothing needs it now"
        )
    return f"unknown setting {key}" + (f": did you mean {known}?" if known else "")
