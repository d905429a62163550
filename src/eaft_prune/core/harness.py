"""Tasks of lm-evaluation-harness: what models answer, and a candidate beside its base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eaft_prune.core.generation import Decoding, Flips
from eaft_prune.core.verdict import Changes


@dataclass(frozen=True)
class Likelihoods:
    """What one model makes of R continuations."""

    logp_R: NDArray[np.float64]
    greedy_R: NDArray[np.bool_]  # every token of it is the likeliest


@dataclass(frozen=True)
class Continuations:
    """Token sequences, the ends of which are to be scored."""

    lists: Sequence[Sequence[int]]
    scored: Sequence[int]  # tokens at the end of each


@dataclass(frozen=True)
class Openings:
    """Prompts that are to be written on, the first being number `first`."""

    lists: Sequence[Sequence[int]]
    how: Decoding
    first: int


@dataclass(frozen=True)
class Answers:
    """One model's S samples of a task, or of all tasks of a group."""

    ids: tuple[str, ...]  # the task, and digests of document, prompt and target
    said: tuple[str, ...]  # what the model gave, as JSON
    scores: Mapping[str, Sequence[float]]  # by metric: of every sample; the first is what counts
    left_out: tuple[str, ...]  # metrics that are no number of a sample, or where less is better
    log: tuple[str, ...]  # the harness's own record of each, as JSON: prompts, answers, targets


@dataclass(frozen=True)
class Scored:
    """One metric of a task: both models' means, and what lies between them."""

    base: float
    candidate: float
    changes: Changes  # dtask, the paired difference; dtask_recovery, candidate / base - 1
    flips: Flips | None  # where a sample is right or wrong


@dataclass(frozen=True)
class TaskReport:
    """A candidate beside its base on the samples of one task."""

    scored: Mapping[str, Scored]  # by metric; the first is the one that gates read
    equal: int  # samples that both answered alike
    left_out: tuple[str, ...]  # metrics that are not compared

    @property
    def first(self) -> tuple[str, Scored]:
        return next(iter(self.scored.items()))

    def values(self) -> dict[str, Any]:
        """Everything by name, as files hold it."""
        return {
            "samples": self.first[1].changes.rows,
            "equal": self.equal,
            "left_out": list(self.left_out),
            "metrics": {
                name: {
                    "base": one.base,
                    "candidate": one.candidate,
                    "changes": one.changes.values(),
                    "flips": None if one.flips is None else vars(one.flips),
                }
                for name, one in self.scored.items()
            },
        }
