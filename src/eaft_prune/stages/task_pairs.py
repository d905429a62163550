"""Two models' answers to one task -> recovery, flips, and the bounds of what lies between them."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import zip_longest

import numpy as np

from eaft_prune.core.harness import Answers, Scored, TaskReport
from eaft_prune.core.types import UserError
from eaft_prune.core.verdict import RECOVERY, Changes
from eaft_prune.maths.generation import Values, change, flips, recovery


def compare(task: str, base: Answers, other: Answers, confidence: float | None) -> TaskReport:
    """A candidate's answers beside the base's, sample by sample.

    Raises UserError where the two were not asked the same: documents, prompts and targets must have
    equal digests.
    """
    for index, (mine, theirs) in enumerate(zip_longest(base.ids, other.ids)):
        if mine != theirs:
            raise UserError(
                f"eval.tasks: sample {index} of {task} is not the same for both models ({mine}, "
                f"{theirs}): a task must not draw its samples or examples anew; give it a seed"
            )
    equal = sum(a == b for a, b in zip(base.said, other.said, strict=True))
    sure, same = 0.95 if confidence is None else confidence, equal == len(base.said)
    return TaskReport(
        {name: _scored(np.array(base.scores[name], float), np.array(some, float), sure, same)
         for name, some in other.scores.items()},
        equal,
        base.left_out,
    )  # fmt: skip


def _scored(base_S: Values, other_S: Values, confidence: float, same: bool) -> Scored:
    found = {"dtask": change(base_S, other_S, confidence, equal=same)}
    if base_S.mean() > 0:  # of nothing, nothing is recovered
        found[RECOVERY] = recovery(base_S, other_S, confidence, equal=same)
    right_or_wrong = bool(np.isin([base_S, other_S], (0, 1)).all())
    return Scored(
        float(base_S.mean()),
        float(other_S.mean()),
        Changes(len(base_S), found),
        flips(base_S == 1, other_S == 1) if right_or_wrong else None,
    )


def changes(reports: Mapping[str, TaskReport]) -> dict[str, Changes]:
    """By task, of the metric that gates read."""
    return {task: report.first[1].changes for task, report in reports.items()}
