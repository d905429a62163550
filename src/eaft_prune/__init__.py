"""Prune experts out of Mixture-of-Experts language models and prove that nothing was lost."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# __init__.pyi has their types: looking at the version must not import all the rest
_API = ("Result", "Results", "RunFailed", "UserError", "load_result", "load_results", "run")


def __getattr__(name: str) -> Any:
    if name not in _API:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.api"), name)
