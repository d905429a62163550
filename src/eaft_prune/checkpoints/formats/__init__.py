"""One file a format that expert weights are stored in: FORMATS lists them."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator

import numpy as np

from eaft_prune.checkpoints.formats.base import Format, Part
from eaft_prune.checkpoints.formats.mxfp4 import MXFP4
from eaft_prune.checkpoints.formats.plain import FLOATS

__all__ = ["FLOATS", "FORMATS", "MXFP4", "format_of", "nan_test", "weights_of"]

FORMATS: tuple[Format, ...] = (MXFP4, *FLOATS.values())


def format_of(projection: str, names: Container[str]) -> Format | None:
    """The format that stores a projection in tensors of its own; None: plain floats do."""
    quantised = (form for form in FORMATS if form.name not in FLOATS)
    return next((form for form in quantised if form.stores(projection, names)), None)


def nan_test(name: str, dtype: str) -> Callable[[bytes], bool] | None:
    """Whether a chunk of this tensor holds NaN; None if its type has none."""
    for part in _parts(name, dtype):
        if part.has_nan is not None:
            return part.has_nan
    match dtype:
        case "F8_E4M3":
            return lambda chunk: bool(((np.frombuffer(chunk, np.uint8) & 0x7F) == 0x7F).any())
        case "F8_E8M0":
            return lambda chunk: 255 in chunk
        case "BF16":
            return lambda chunk: bool(((np.frombuffer(chunk, "<u2") & 0x7FFF) > 0x7F80).any())
        case "F16" | "F32" | "F64":
            kind = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}[dtype]
            return lambda chunk: bool(np.isnan(np.frombuffer(chunk, kind)).any())
    return None


def weights_of(name: str, dtype: str) -> int:
    """Weights that one stored number of this tensor stands for."""
    return next((part.weights for part in _parts(name, dtype)), 1)


def _parts(name: str, dtype: str) -> Iterator[Part]:
    """What a tensor of this name may be a part of; those with a suffix first."""
    for form in FORMATS:
        for part in form.parts:
            if part.suffix and name.endswith(part.suffix) and part.dtype == dtype:
                yield part
