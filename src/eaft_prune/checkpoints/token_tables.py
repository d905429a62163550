"""Routers that read a token's experts off a table (DeepSeek-V4), with fewer experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eaft_prune.checkpoints.read import ModelFiles, tensor_bytes
from eaft_prune.core.types import KeepPlan, UserError

_TYPES = {"I64": "<i8", "I32": "<i4", "I16": "<i2", "U8": "u1", "I8": "i1"}


def remapped(ids_TK: NDArray[Any], kept: Sequence[int]) -> NDArray[Any]:
    """New ids of every token's experts, as many and as different as before.

    A kept expert stays where it is. A dropped one's place goes to the next kept expert, counted
    from its id and round again, that its token does not have yet; places are filled from the left.
    """
    old_N = np.array(kept)
    out_TK = ids_TK.astype(np.int64)
    is_kept_TK = np.isin(ids_TK, old_N)
    out_TK = np.where(is_kept_TK, np.searchsorted(old_N, out_TK), -1)
    for place in range(ids_TK.shape[1]):
        rows = np.flatnonzero(~is_kept_TK[:, place])
        new = np.searchsorted(old_N, ids_TK[rows, place]) % len(old_N)
        for _ in range(ids_TK.shape[1]):
            taken = (out_TK[rows] == new[:, None]).any(axis=1)
            new = np.where(taken, (new + 1) % len(old_N), new)
        out_TK[rows, place] = new
    return out_TK.astype(ids_TK.dtype)


def with_tables(
    source: ModelFiles, tables: Mapping[str, int], plan: KeepPlan, scratch: Path
) -> ModelFiles:
    """`source` with tables of tokens, by the layer of their experts, for the plan's experts.

    The changed tables are added to the file `scratch`, and their entries point there. Raises
    UserError for one that is stored in a type that is no integer.
    """
    if not tables:
        return source
    tensors = dict(source.tensors)
    with scratch.open("ab") as file:
        for name, layer in tables.items():
            entry = tensors[name]
            if entry.dtype not in _TYPES:
                raise UserError(
                    f"tensor {name} is {entry.dtype}: a table of experts is integers, one of "
                    f"{', '.join(_TYPES)}"
                )
            stored = np.frombuffer(b"".join(tensor_bytes(source, name)), _TYPES[entry.dtype])
            table_TK = remapped(stored.reshape(entry.shape), plan.kept[layer])
            tensors[name] = replace(entry, file=str(scratch.resolve()), start=file.tell())
            file.write(table_TK.tobytes())
    return replace(source, tensors=tensors)
