"""Settings that start programs or import modules: a file of a stranger's may not set them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_PROGRAMS = (
    "engine.python",
    "engine.converter",
    "engine.args",
    "engine.env",
    "decode_bench.candidate_args",
)
_MODULE = "pruning.function"


def runs_code(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted setting -> its value, of those that start a program or name a module to import.

    The settings may have any shape: they are looked at before anything validates them.
    """
    found = {name: _at(settings, name) for name in (*_PROGRAMS, _MODULE)}
    found["engine.name"] = _named(_at(settings, "engine.name"))
    space = _at(settings, "search.space")
    found["search.space"] = _MODULE if isinstance(space, Mapping) and _MODULE in space else None
    for gate in ("gate", "beside"):
        found[f"{gate}.metrics"] = _modules(_at(settings, f"{gate}.metrics"))
        packs = _at(settings, f"{gate}.packs")
        for pack in packs if isinstance(packs, Mapping) else ():
            found[f"{gate}.packs.{pack}.metrics"] = _modules(_at(packs[pack], "metrics"))
    return {name: value for name, value in found.items() if value}


def _at(settings: Any, name: str) -> Any:
    for part in name.split("."):
        settings = settings.get(part) if isinstance(settings, Mapping) else None
    return settings


def _named(value: Any) -> Any:
    return value if isinstance(value, str) and ":" in value else None


def _modules(limits: Any) -> list[str]:
    return [key for key in limits if _named(key)] if isinstance(limits, Mapping) else []
