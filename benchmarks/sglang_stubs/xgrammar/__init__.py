"""Stub: sglang names these classes in type hints; --grammar-backend none never uses one."""

from typing import Any


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return Any
