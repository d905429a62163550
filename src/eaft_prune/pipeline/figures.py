"""The numbers of a comparison, through the store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import eaft_prune.maths
from eaft_prune.core.digests import array_digest, digest, file_digest
from eaft_prune.core.files import why_not_writable
from eaft_prune.core.step import Step
from eaft_prune.core.types import EvalKey, Evaluation
from eaft_prune.core.verdict import Changes, Estimate, PackReport
from eaft_prune.maths.metrics import METRICS
from eaft_prune.pipeline.compare import Measured, Terms, measured
from eaft_prune.pipeline.session import Session

_VERSION = 1


Of = tuple[str, str, int]  # model label, pack, length


@dataclass(frozen=True)
class Figures:
    """`Measured` in lists: files keep their order, and that of no mapping."""

    reports: tuple[tuple[Of, tuple[tuple[str, float], ...]], ...]  # by name
    changes: tuple[tuple[Of, int, tuple[tuple[str, tuple[float, ...]], ...]], ...]  # and rows


def from_store(session: Session, sides: Sequence[Evaluation], terms: Terms) -> Measured:
    """`measured` of equal token scores, once.

    Metrics of the user's own are code that no key knows: with them, as where a store that cannot be
    written lacks the numbers, they are made anew.
    """
    step = Step(
        "compare",
        _VERSION,
        {
            "metrics": [metric.name for metric in terms.metrics],
            "cc_quantile": terms.cc_quantile,
            "confidence": terms.confidence,
            "sides": [side.model for side in sides],
        },
        {"formulas": _formulas(), "scores": digest([_scores_digest(side) for side in sides])},
        Figures,
        lambda: _flat(measured(sides, terms)),
    )
    known = all(metric in METRICS for metric in terms.metrics)
    home = session.store.root / step.stage
    if known and (why_not_writable(home) is None or session.store.holds(step)):
        return _nested(session.run(step).value, sides)
    return measured(sides, terms)


@cache
def _formulas() -> str:
    """Digest of the code that makes the numbers."""
    home = Path(*eaft_prune.maths.__path__)
    return digest([file_digest(path) for path in sorted(home.glob("*.py"))])


def _scores_digest(side: Evaluation) -> list[Any]:
    return [
        [*key, array_digest(side.rows[key])]
        + [None if array is None else array_digest(array) for array in vars(scores).values()]
        for key, scores in side.scores.items()
    ]


def _flat(found: Measured) -> Figures:
    reports = [
        ((side, *key), tuple(report.values().items()))
        for side, of_key in found.reports.items()
        for key, report in of_key.items()
    ]
    changes = [
        ((side, *key), some.rows, tuple((n, astuple(e)) for n, e in some.estimates.items()))
        for side, of_key in found.changes.items()
        for key, some in of_key.items()
    ]
    return Figures(tuple(reports), tuple(changes))


def _nested(figures: Figures, sides: Sequence[Evaluation]) -> Measured:
    reports: dict[str, dict[EvalKey, PackReport]] = {side.model: {} for side in sides}
    for (side, pack, length), values in figures.reports:
        reports[side][pack, length] = _report(dict(values))
    changes: dict[str, dict[EvalKey, Changes]] = {side.model: {} for side in sides[1:]}
    for (side, pack, length), rows, estimates in figures.changes:
        found = {name: Estimate(*parts) for name, parts in estimates}
        changes[side][pack, length] = Changes(rows, found)
    return Measured(reports, changes)


def _report(values: dict[str, Any]) -> PackReport:
    own = {field.name for field in fields(PackReport)}
    further = {name: value for name, value in values.items() if name not in own}
    return PackReport(**{n: v for n, v in values.items() if n in own}, further=further)
