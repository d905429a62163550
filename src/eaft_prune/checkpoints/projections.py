"""Where a checkpoint keeps the projections of a layer's experts, by the names of its tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from eaft_prune.checkpoints.formats import FLOATS, format_of
from eaft_prune.checkpoints.formats.base import Storage
from eaft_prune.checkpoints.read import TensorEntry
from eaft_prune.core.types import UserError

GATE_UP, DOWN = "gate_up_proj", "down_proj"
# a tensor of all experts of a layer, or of one; what it holds; how it goes on
_NAME = re.compile(
    r"(?P<experts>.*\.layers\.(?P<layer>\d+)\..*(?<=\.)experts)\.((?P<one>\d+)\.)?"
    r"(?P<what>gate_up_proj|down_proj|gate_proj|up_proj|w1|w2|w3)(?P<end>.*)"
)
# of tensors that hold one expert: (gate, up) and down; gate rows come before up rows
_SINGLE = ((("gate_proj", "up_proj"), "down_proj"), (("w1", "w3"), "w2"))
_ENDS = {"bias": (DOWN,), "down_proj": (DOWN,), "experts": (DOWN, GATE_UP)}


@dataclass(frozen=True)
class Projections:
    """One layer's: `experts` begins all names; single: what tensors of one expert are called."""

    experts: str
    single: tuple[tuple[str, str], str] | None
    storage: Storage

    def entries(
        self, name: str, whole: TensorEntry, like: Mapping[str, TensorEntry]
    ) -> list[TensorEntry]:
        """The checkpoint's tensors, under new ids, in the bytes of one tensor of all experts.

        `name` is that within the experts, such as `down_proj_bias`; `like` has the dtypes.
        """
        if self.single is None:
            own = f"{self.experts}.{name}"
            return [replace(whole, name=own, dtype=like[own].dtype)]
        (gate_up, down), out = self.single, []
        parts = gate_up if name == GATE_UP else (down,)
        count, rows, *rest = whole.shape
        size = whole.nbytes // count // len(parts)
        for index in range(count * len(parts)):
            own = f"{self.experts}.{index // len(parts)}.{parts[index % len(parts)]}.weight"
            shape = (rows // len(parts), *rest)
            start = whole.start + index * size
            out.append(TensorEntry(own, whole.file, like[own].dtype, shape, start, size))
        return out


def projections_of(tensors: Mapping[str, TensorEntry]) -> dict[int, Projections]:
    """Of every layer that has experts.

    Raises UserError where they are stored in several types, or in a way not known here.
    """
    found: dict[int, list[re.Match[str]]] = {}
    for name in tensors:
        if match := _NAME.fullmatch(name):
            found.setdefault(int(match["layer"]), []).append(match)
    layers = {layer: _of_layer(tensors, matches) for layer, matches in found.items()}
    kinds = sorted({str(layer.storage) for layer in layers.values()})
    if len(kinds) != 1:
        what = f"are stored in several types: {', '.join(kinds)}" if kinds else "are not found"
        raise UserError(
            f"pruning.compensation: this checkpoint's projections of experts {what}; use "
            "pruning.compensation=none"
        )
    return layers


def _of_layer(tensors: Mapping[str, TensorEntry], found: Sequence[re.Match[str]]) -> Projections:
    prefix, names = found[0]["experts"], {match["what"] for match in found}
    if found[0]["one"] is None:
        single, stems = None, [f"{prefix}.{name}" for name in (GATE_UP, DOWN)]
    else:
        single = next(parts for parts in _SINGLE if parts[1] in names)
        stems = [f"{prefix}.{found[0]['one']}.{name}.weight" for name in (*single[0], single[1])]
    return Projections(prefix, single, _storage(tensors, stems))


def changeable(names: Iterable[str], level: str) -> frozenset[str]:
    """Names of the tensors that a level of compensation may change."""
    return frozenset(name for name in names if (m := _NAME.fullmatch(name)) and _may(m, level))


def _may(found: re.Match[str], level: str) -> bool:
    if found["one"] is None:
        wanted = _ENDS.get(level, ())
        bias_alone = level == "bias"
        return found["what"] in wanted and (not bias_alone or found["end"] == "_bias")
    downs = {single[1] for single in _SINGLE}
    return level == "experts" or (level == "down_proj" and found["what"] in downs)


def _storage(tensors: Mapping[str, TensorEntry], stems: Sequence[str]) -> Storage:
    found: dict[Storage, None] = {}
    for stem in stems:
        entry = tensors.get(stem)
        weight = format_of(stem, tensors) or FLOATS.get(entry.dtype if entry else "")
        if weight is None:
            how = entry.dtype if entry else "packed"
            raise UserError(
                f"pruning.compensation: {stem} is {how}, which cannot be refitted; use "
                "pruning.compensation=none"
            )
        bias = tensors.get(f"{stem}_bias")
        found[Storage(weight, FLOATS[bias.dtype] if bias else None)] = None
    if len(found) > 1:
        raise UserError(
            f"pruning.compensation: {' and '.join(stems)} are stored in different types, "
            f"{' and '.join(sorted(map(str, found)))}; use pruning.compensation=none"
        )
    return next(iter(found))
