"""Compensation from settings to export, by way of the store; its maths is in repair/."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from eaft_prune.checkpoints.formats import FLOATS, format_of
from eaft_prune.checkpoints.formats.base import Storage
from eaft_prune.checkpoints.model import Model
from eaft_prune.checkpoints.read import TensorEntry, read_header
from eaft_prune.core.digests import digest
from eaft_prune.core.step import Step
from eaft_prune.core.store import ARRAYS, Stored
from eaft_prune.core.types import KeepPlan, UserError
from eaft_prune.pipeline.requests import compensating
from eaft_prune.pipeline.session import Session

if TYPE_CHECKING:
    from eaft_prune.repair.compensate import Compensation, Level

VERSION = 2  # of the stage, whose module imports torch


@dataclass(frozen=True)
class Compensated:
    """Tensors of kept experts that are not the base's, where their bytes lie, and how they came."""

    entries: Mapping[str, TensorEntry] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)  # `compensation`, where there is any
    changed_tensors: Mapping[str, Any] = field(default_factory=dict)  # likewise: name -> sha256


def level(session: Session, plan: KeepPlan) -> Level | None:
    """What of this plan's experts is changed, if anything: a plan that keeps all lost nothing."""
    asked = session.experiment.pruning.compensation
    return None if asked == "none" or plan.keeps_all else asked


def key(session: Session, base: Model, plan: KeepPlan) -> str:
    """Digest of all that the changes are made from, known before they are made."""
    return digest([VERSION, *_made_from(session, base, plan)])


def compensated(session: Session, base: Model, plan: KeepPlan) -> Compensated:
    """compensate: changed down projections of the kept experts, from the store or computed."""
    asked = level(session, plan)
    if asked is None:
        return Compensated()
    from eaft_prune.repair import compensate  # torch: not before settings are checked

    prefix = base.family.compensated
    if prefix is None:
        raise UserError(
            f"pruning.compensation = {asked!r}: {base.family.model_type} checkpoints cannot be "
            "compensated; use pruning.compensation=none"
        )
    storage = _storage(base, prefix(0))
    blocks = session.blocks(base, compensating(session.experiment))
    settings = session.experiment.compensation
    tokens = 2 * blocks.value.ids_BS.size  # through both streams

    def compute() -> Compensation:
        engine = session.local_engine(base)
        with session.bars.bar("compensate", tokens * len(plan.kept), "tok") as on_tokens:
            return compensate.compensate(
                engine, plan, blocks.value, asked, settings, storage, on_tokens
            )

    stored = session.run(
        Step(
            "compensate",
            VERSION,
            *_made_from(session, base, plan),
            compensate.Compensation,
            compute,
            lambda value, seconds: {
                "tokens": tokens,
                "scored_tokens": value.scored_tokens,
                "residual": _mean(value.stored),
                "held_out": _mean(value.held_out),
                "held_out_by_half": _mean(value.held_out_by_half),
                "ridges": list(value.ridges),
            },
        )
    )
    value = stored.value
    names = [prefix(layer) + name for layer, name, _, _ in value.tensors]
    return Compensated(
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


def _made_from(
    session: Session, base: Model, plan: KeepPlan
) -> tuple[dict[str, Any], dict[str, str]]:
    """Settings and input digests of the stage."""
    experiment = session.experiment
    settings = {
        "level": experiment.pruning.compensation,
        **experiment.compensation.model_dump(exclude={"pack", "num_blocks"}),
        "dtype": session.dtype,
    }
    blocks = session.blocks(base, compensating(session.experiment)).digest
    return settings, {"model": base.digest, "plan": plan.digest, "blocks": blocks}


def _storage(base: Model, prefix: str) -> Storage:
    """How the projections of experts are stored; raises UserError if each in its own type."""
    tensors = base.files.tensors
    found: dict[Storage, None] = {}
    for stem in (f"{prefix}down_proj", f"{prefix}gate_up_proj"):
        weight = format_of(stem, tensors) or FLOATS[tensors[stem].dtype]
        found[Storage(weight, FLOATS[tensors[f"{stem}_bias"].dtype])] = None
    if len(found) > 1:
        raise UserError(
            f"pruning.compensation: {prefix}down_proj and gate_up_proj are stored in different "
            f"types, {' and '.join(sorted(map(str, found)))}; use pruning.compensation=none"
        )
    return next(iter(found))


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
