"""Compensation from settings to export, by way of the store; its maths is stages/compensate.py."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from eaft_prune.checkpoints.read import TensorEntry, read_header
from eaft_prune.core.digests import digest
from eaft_prune.core.store import ARRAYS, Stored
from eaft_prune.core.types import KeepPlan, UserError
from eaft_prune.pipeline.session import Bench, Model
from eaft_prune.stages.pack import BlockRequest

if TYPE_CHECKING:
    from eaft_prune.engines.storage import Storage
    from eaft_prune.repair.compensate import Compensation, Level

VERSION = 2  # of the stage, whose module imports torch


@dataclass(frozen=True)
class Repair:
    """Tensors of kept experts that are not the base's, where their bytes lie, and how they came."""

    entries: Mapping[str, TensorEntry] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)  # `compensation`, where there is any
    changed_tensors: Mapping[str, Any] = field(default_factory=dict)  # likewise: name -> sha256


def level(bench: Bench, plan: KeepPlan) -> Level | None:
    """What of this plan's experts is changed, if anything: a plan that keeps all lost nothing."""
    asked = bench.experiment.pruning.compensation
    return None if asked == "none" or plan.keeps_all else asked


def key(bench: Bench, base: Model, plan: KeepPlan) -> str:
    """Digest of all that the changes are made from, known before they are made."""
    return digest([VERSION, *_made_from(bench, base, plan)])


def compensated(bench: Bench, base: Model, plan: KeepPlan) -> Repair:
    """compensate: changed down projections of the kept experts, from the store or computed."""
    asked = level(bench, plan)
    if asked is None:
        return Repair()
    from eaft_prune.repair import compensate  # torch: not before settings are checked

    prefix = base.family.compensated
    if prefix is None:
        raise UserError(
            f"pruning.compensation = {asked!r}: {base.family.model_type} checkpoints cannot be "
            "compensated; use pruning.compensation=none"
        )
    storage = _storage(base, prefix(0))
    blocks = bench.blocks(base, _request(bench))
    settings = bench.experiment.compensation
    tokens = 2 * settings.num_blocks * blocks.value.seq_len * len(plan.kept)

    def compute() -> Compensation:
        engine = bench.local_engine(base)
        with bench.bars.bar("compensate", tokens, "tok") as on_tokens:
            return compensate.compensate(
                engine, plan, blocks.value, asked, settings, storage, on_tokens
            )

    stored = bench.stage(
        "compensate",
        VERSION,
        *_made_from(bench, base, plan),
        compensate.Compensation,
        compute,
        lambda value, seconds: {
            "scored_tokens": value.scored_tokens,
            "residual": _mean(value.stored),
            "held_out": _mean(value.held_out),
            "held_out_by_half": _mean(value.held_out_by_half),
            "ridges": list(value.ridges),
        },
    )
    value = stored.value
    names = [prefix(layer) + name for layer, name, _, _ in value.tensors]
    return Repair(
        entries=_entries(base, stored, names),
        facts={
            "compensation": {
                "level": asked,
                **settings.model_dump(),
                "ridges": value.ridges,
                "scored_tokens": value.scored_tokens,
                "token_digest": blocks.record.facts["token_digest"],
                "residual_solved": value.solved,
                "residual_stored": value.stored,
                "residual_held_out": value.held_out,
                "residual_held_out_by_half": value.held_out_by_half,
            }
        },
        changed_tensors={"changed_tensors": dict(_hashes(stored, names))},
    )


def _mean(residuals: Sequence[float]) -> float:
    """Over layers; geometric, as residuals are ratios."""
    return math.prod(residuals) ** (1 / len(residuals))


def _request(bench: Bench) -> BlockRequest:
    settings = bench.experiment.compensation
    seq_len = bench.experiment.profile.seq_len
    return BlockRequest(settings.pack, "profile", seq_len, settings.num_blocks, settings.seed)


def _made_from(bench: Bench, base: Model, plan: KeepPlan) -> tuple[dict[str, Any], dict[str, str]]:
    """Settings and input digests of the stage."""
    experiment = bench.experiment
    settings = {
        "level": experiment.pruning.compensation,
        **experiment.compensation.model_dump(exclude={"pack", "num_blocks"}),
        "dtype": bench.dtype(),
    }
    blocks = bench.blocks(base, _request(bench)).digest
    return settings, {"model": base.digest, "plan": plan.digest, "blocks": blocks}


def _storage(base: Model, prefix: str) -> Storage:
    """How the projections of experts are stored; raises UserError if each in its own type."""
    from eaft_prune.engines.storage import Storage

    tensors = base.files.tensors
    found = set()
    for stem in (f"{prefix}down_proj", f"{prefix}gate_up_proj"):
        weight = "MXFP4" if f"{stem}_blocks" in tensors else tensors[stem].dtype
        found.add(Storage(weight, tensors[f"{stem}_bias"].dtype))
    if len(found) > 1:
        raise UserError(
            f"pruning.compensation: {prefix}down_proj and gate_up_proj are stored in different "
            f"types, {' and '.join(sorted(map(str, found)))}; use pruning.compensation=none"
        )
    return found.pop()


def _entries(base: Model, stored: Stored[Compensation], names: list[str]) -> dict[str, TensorEntry]:
    """Where in the stage's own output each tensor's bytes lie."""
    file = (stored.record.path / ARRAYS).resolve()
    (data,) = read_header(file)
    entries, start = {}, data.start
    for name, (_, _, shape, nbytes) in zip(names, stored.value.tensors, strict=True):
        dtype = base.files.tensors[name].dtype
        entries[name] = TensorEntry(name, str(file), dtype, shape, start, nbytes)
        start += nbytes
    return entries


def _hashes(stored: Stored[Compensation], names: list[str]) -> list[tuple[str, str]]:
    data, start, hashes = stored.value.data, 0, []
    for name, (_, _, _, nbytes) in zip(names, stored.value.tensors, strict=True):
        hashes.append((name, hashlib.sha256(data[start : start + nbytes].data).hexdigest()))
        start += nbytes
    return hashes
