"""The numbers of a comparison, through the store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
_COUNTS = ("scored_tokens", "blocks", "rows")


@dataclass(frozen=True)
class Figures:
    """Every number of a comparison: what it is of, and its value."""

    of: tuple[tuple[str, str, int, str, str], ...]  # side, pack, length, name, part of an estimate
    values_N: NDArray[np.float64]


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
    if known and (session.store.holds(step) or why_not_writable(home) is None):
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
    numbers: dict[tuple[str, str, int, str, str], float] = {}
    for side, reports in found.reports.items():
        for key, report in reports.items():
            numbers |= {(side, *key, name, ""): value for name, value in report.values().items()}
    for side, of_key in found.changes.items():
        for key, changes in of_key.items():
            numbers[side, *key, "", "rows"] = changes.rows
            for name, estimate in changes.estimates.items():
                numbers |= {(side, *key, name, part): x for part, x in vars(estimate).items()}
    return Figures(tuple(numbers), np.array(list(numbers.values()), np.float64))


def _nested(figures: Figures, sides: Sequence[Evaluation]) -> Measured:
    found: dict[str, dict[EvalKey, dict[str, dict[str, float]]]] = {s.model: {} for s in sides}
    for (side, pack, length, name, part), value in zip(
        figures.of, figures.values_N.tolist(), strict=True
    ):
        of_name = found[side].setdefault((pack, length), {})
        of_name.setdefault(name, {})[part] = value
    reports = {side: {key: _report(of) for key, of in keys.items()} for side, keys in found.items()}
    changes = {
        side.model: {key: _changes(of) for key, of in found[side.model].items() if "" in of}
        for side in sides[1:]
    }
    return Measured(reports, changes)


def _report(of: dict[str, dict[str, float]]) -> PackReport:
    plain = {name: parts[""] for name, parts in of.items() if "" in parts}
    own = {field.name for field in fields(PackReport)}
    counts = {name: int(plain[name]) for name in _COUNTS}
    further = {name: value for name, value in plain.items() if name not in own}
    rest: dict[str, Any] = {name: value for name, value in plain.items() if name in own}
    return PackReport(**{**rest, **counts, "further": further})


def _changes(of: dict[str, dict[str, float]]) -> Changes:
    estimates = {
        name: Estimate(**{part: value for part, value in parts.items() if part})
        for name, parts in of.items()
        if name and len(parts) > 1
    }
    return Changes(int(of[""]["rows"]), estimates)
