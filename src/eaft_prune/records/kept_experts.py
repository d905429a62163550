"""Which experts another program kept: its report, read as experts of numbered layers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eaft_prune.core.foreign import check_regular, parsed_json
from eaft_prune.core.types import UserError

_LAYER = re.compile(r"\blayers?\.(\d+)\b")
Kept = dict[int, tuple[int, ...]]  # layer's number in the model -> ids, ascending


def read_kept(path: Path, rank_by: str, keep_n: int) -> Kept:
    """The kept experts of every layer that a file names.

    llm-compressor's REAPPruningModifier writes JSON of modules' names and retained ids
    (`report_path`), task=plan a JSON file with `kept`. REAP keeps no list: its observations (a .pt
    file, one mapping of metrics a layer) rank the experts by `rank_by`, and the keep_n best stay,
    ties to the lower id. Raises UserError where a file is none of these.
    """
    check_regular(path)
    found = _observed(path, rank_by, keep_n) if path.suffix == ".pt" else _listed(path)
    for layer, ids in found.items():
        if not ids or len(set(ids)) < len(ids):
            raise UserError(f"{path}: layer {layer} keeps {list(ids)}: no expert, or one twice")
    return {layer: tuple(sorted(ids)) for layer, ids in sorted(found.items())}


def _listed(path: Path) -> Kept:
    value = parsed_json(path)
    if isinstance(value, dict) and isinstance(value.get("kept"), list):
        return {layer: _ids(path, layer, ids) for layer, ids in enumerate(value["kept"])}
    if not isinstance(value, dict) or not value:
        raise UserError(f"{path} lists no kept experts: {{module: [ids]}} or {{kept: [[ids]]}}")
    found: Kept = {}
    for name, ids in value.items():
        number = _LAYER.search(name)
        if number is None or int(number[1]) in found:
            raise UserError(f"{path}: {name!r} is not the one module of a numbered layer")
        found[int(number[1])] = _ids(path, name, ids)
    return found


def _ids(path: Path, where: object, ids: Any) -> tuple[int, ...]:
    whole = isinstance(ids, list) and all(type(i) is int and i >= 0 for i in ids)
    if not whole:
        raise UserError(f"{path}: what {where} keeps is no list of experts' numbers")
    return tuple(ids)


def _observed(path: Path, rank_by: str, keep_n: int) -> Kept:
    import pickle

    import torch

    try:
        value = torch.load(path, map_location="cpu", weights_only=True)  # runs none of its code
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        why = str(error).splitlines()[0]
        raise UserError(
            f"{path} holds more than tensors and numbers, or is damaged: {why}"
        ) from None
    if not isinstance(value, Mapping) or not all(
        isinstance(one, Mapping) for one in value.values()
    ):
        raise UserError(f"{path} is not a mapping from layers to metrics, as REAP observes them")
    found: Kept = {}
    for layer, metrics in value.items():
        if rank_by not in metrics:
            raise UserError(
                f"candidate.rank_by = {rank_by!r}: {path} has, of layer {layer}, "
                f"{', '.join(sorted(map(str, metrics)))}"
            )
        scores = torch.as_tensor(metrics[rank_by]).double()
        if scores.ndim != 1 or len(scores) < keep_n or bool(scores.isnan().any()):
            raise UserError(
                f"{path}: {rank_by} of layer {layer} does not rank the pruning.keep_n = {keep_n} "
                f"experts that are to stay (shape {list(scores.shape)})"
            )
        order = torch.sort(scores, descending=True, stable=True).indices
        found[int(layer)] = tuple(int(i) for i in order[:keep_n])
    return found
