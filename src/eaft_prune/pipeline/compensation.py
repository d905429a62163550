"""Compensation from settings to export, by way of the store; its maths is in repair/."""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eaft_prune.checkpoints.families.base import table_of
from eaft_prune.checkpoints.model import Model
from eaft_prune.checkpoints.projections import Projections, projections_of
from eaft_prune.checkpoints.read import TensorEntry, read_header
from eaft_prune.core.digests import digest
from eaft_prune.core.step import Step
from eaft_prune.core.store import ARRAYS, Stored
from eaft_prune.core.types import KeepPlan
from eaft_prune.pipeline.requests import compensating
from eaft_prune.pipeline.session import Session

if TYPE_CHECKING:
    from eaft_prune.repair.compensate import Compensation, LayerResult
    from eaft_prune.repair.layer import Level

VERSION = 3  # of the stage, whose module imports torch
_LAYERS = "compensate_layer"  # stage of a layer's part, which goes when the whole is there


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
    """compensate: changed projections of the kept experts, from the store or computed."""
    asked = level(session, plan)
    if asked is None:
        return Compensated()
    from eaft_prune.repair import compensate  # torch: not before settings are checked
    from eaft_prune.repair.layer import How

    storage = next(iter(_projections(base).values())).storage
    blocks = session.blocks(base, compensating(session.experiment))
    settings = session.experiment.compensation
    tokens = 2 * blocks.value.ids_BS.size * settings.passes  # at most, through both streams
    kept = _Layers(session, key(session, base, plan))

    def compute() -> Compensation:
        engine = session.local_engine(base)
        how = How(asked, settings, storage)
        with session.bars.bar("compensate", tokens * len(plan.kept), "tok") as on_tokens:
            return compensate.compensate(engine, plan, blocks.value, how, on_tokens, kept)

    stored = session.run(
        Step(
            "compensate",
            VERSION,
            *_made_from(session, base, plan),
            compensate.Compensation,
            compute,
            lambda value, seconds: {
                "tokens": tokens // settings.passes * len(value.distances),
                "scored_tokens": value.scored_tokens,
                "passes": value.passes,
                "distances": list(value.distances),
                "residual": _mean(value.stored),
                "held_out": _mean(value.held_out),
                "held_out_by_half": _mean(value.held_out_by_half),
                "ridges": list(value.ridges),
            },
        )
    )
    kept.forget()
    value = stored.value
    changed = _entries(base, stored)
    return Compensated(
        entries={entry.name: entry for entry in changed},
        facts={
            "compensation": {
                "level": asked,
                **settings.model_dump(),
                "passes_taken": value.passes,
                "held_out_distances": value.distances,
                "ridges": value.ridges,
                "scored_tokens": value.scored_tokens,
                "token_digest": blocks.record.facts["token_digest"],
                "residual_solved": value.solved,
                "residual_stored": value.stored,
                "residual_held_out": value.held_out,
                "residual_held_out_by_half": value.held_out_by_half,
            }
        },
        changed_tensors={"changed_tensors": dict(_hashes(changed))},
    )


@dataclass(frozen=True)
class _Layers:
    """Layers that are done, in the store until the whole is: a killed run loses one layer."""

    session: Session
    whole: str  # key of what they are parts of
    done: dict[str, Path] = field(default_factory=dict)

    def __call__(self, name: str, compute: Callable[[], LayerResult]) -> LayerResult:
        from eaft_prune.repair.compensate import LayerResult

        # what a layer is made from besides: the layers before it, which the whole's key determines
        identity = {"whole": self.whole, "layer": name}
        step = Step(f"{_LAYERS}/{name}", VERSION, identity, {}, LayerResult, compute)
        stored = self.session.store.run(step)
        self.done[name] = stored.record.path
        return stored.value

    def forget(self) -> None:
        """Remove them; nobody else has them, as the whole was made under its lock."""
        for path in self.done.values():
            shutil.rmtree(path, ignore_errors=True)
            path.with_name(f"{path.name}.lock").unlink(missing_ok=True)
        self.done.clear()


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


def _projections(base: Model) -> dict[int, Projections]:
    """By the model's own number, of the layers that a plan is for."""
    table = table_of(base.family, base.files)
    mine = {name: e for name, e in base.files.tensors.items() if not table[name].further}
    return projections_of(mine)


def _entries(base: Model, stored: Stored[Compensation]) -> list[TensorEntry]:
    """Where in the stage's own output each tensor's bytes lie."""
    file = (stored.record.path / ARRAYS).resolve()
    (data,) = read_header(file)
    entries, start = list[TensorEntry](), data.start
    tensors, places = base.files.tensors, _projections(base)
    numbers = base.family.layer_numbers(base.files.config)
    for layer, name, shape, nbytes in stored.value.tensors:
        whole = TensorEntry(name, str(file), "", shape, start, nbytes)
        entries += places[numbers[layer]].entries(name, whole, tensors)
        start += nbytes
    return entries


def _hashes(entries: Sequence[TensorEntry]) -> list[tuple[str, str]]:
    hashes = []
    for entry in entries:
        with Path(entry.file).open("rb") as file:
            file.seek(entry.start)
            hashes.append((entry.name, hashlib.sha256(file.read(entry.nbytes)).hexdigest()))
    return hashes
