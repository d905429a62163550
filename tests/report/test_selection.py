"""The table of a plan: every number is that of a loop over experts."""

from __future__ import annotations

import re

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from eaft_prune.core.outcome import Selection
from eaft_prune.core.types import ExpertScores, KeepPlan
from eaft_prune.report.selection import abbreviated, selection_table


def selection(score_LE: np.ndarray, kept: tuple[tuple[int, ...], ...]) -> Selection:
    shape = score_LE.shape
    count = np.ones(shape, np.int64)
    scores = ExpertScores(score_LE, np.ones(shape), count, {}, np.ones((1, *shape)))
    return Selection("reap", scores, KeepPlan(kept, shape[1]), {})


def test_margin_and_range() -> None:
    score_LE = np.array([[0.5, 0.25, 1.0, -2.0], [1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 1.0, 1.0]])
    text = selection_table(selection(score_LE, ((0, 2), (0, 3), (0, 1, 2, 3))))
    cells = [re.split(" {2,}", line.strip()) for line in text.splitlines()[-3:]]
    assert cells == [
        ["0", "2", "-2", "1", "0.25", "0,2"],
        ["1", "2", "1", "4", "-2", "0,3"],  # 0 is of the core, 2 has a higher score
        ["2", "4", "1", "1", "0-3"],  # nothing was cut
    ]


def ids_of(text: str) -> list[int]:
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


@given(st.sets(st.integers(0, 200), min_size=1))
def test_abbreviated_ids_are_the_first_of_them(ids: set[int]) -> None:
    ordered = sorted(ids)
    text = abbreviated(ordered)
    assert len(text) <= 40
    whole, ellipsis, _ = text.partition(",…")
    read = ids_of(whole)
    assert read == ordered[: len(read)]
    assert bool(ellipsis) == (len(read) < len(ordered))
