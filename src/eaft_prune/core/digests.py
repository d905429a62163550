"""Canonical JSON and digests; refuses what has no stable bytes."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def canonical_json(value: Any) -> str:
    """JSON text that is equal for equal values: sorted keys, no spaces, no NaN.

    Raises TypeError for anything but None, bool, int, float, str, sequences and str-keyed mappings
    (a set, an object or a Path has no bytes that are the same in the next process).
    """
    return json.dumps(_canonical(value, "$"), sort_keys=True, separators=(",", ":"))


def digest(value: Any) -> str:
    """sha256 hex of `canonical_json(value)`."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def array_digest(array: NDArray[Any]) -> str:
    """sha256 hex over dtype, shape and the little-endian C-order bytes of an array."""
    if array.dtype.hasobject:
        raise TypeError(f"an array of dtype {array.dtype} has no stable bytes")
    data = np.asarray(array.astype(array.dtype.newbyteorder("<"), copy=False), order="C")
    sha = hashlib.sha256(f"{data.dtype.str}{data.shape}".encode())
    sha.update(data.reshape(-1).view(np.uint8).data if data.size else b"")
    return sha.hexdigest()


def file_digest(path: Path) -> str:
    """sha256 hex of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _canonical(value: Any, where: str) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise TypeError(f"{where} is {value}: only finite numbers have a canonical form")
        return value
    if isinstance(value, list | tuple):
        return [_canonical(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{where} has the key {key!r}: only str keys have a canonical form")
        return {key: _canonical(item, f"{where}.{key}") for key, item in value.items()}
    raise TypeError(f"{where} is a {type(value).__name__}: no stable bytes, so no fingerprint")
