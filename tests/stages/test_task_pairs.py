"""Answers of two models to one task: paired or refused, recovery with bounds over samples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from scipy.stats import binomtest

from eaft_prune.core.harness import Answers
from eaft_prune.core.types import UserError
from eaft_prune.stages.task_pairs import changes, compare


def answers(
    right: Sequence[float], said: Sequence[str] | None = None, prompt: str = "p"
) -> Answers:
    ids = tuple(f"quiz d{i} {prompt} t{i}" for i in range(len(right)))
    told = tuple(map(str, right)) if said is None else tuple(said)
    return Answers(ids, told, {"acc": tuple(right)}, (), told)


def test_equal_answers_are_sure_and_others_are_not() -> None:
    same = compare("quiz", answers([1, 0, 1, 1]), answers([1, 0, 1, 1]), 0.95)
    found = same.first[1].changes
    assert (found["dtask"].low, found["dtask"].high) == (0, 0)
    assert (found["dtask_recovery"].low, found["dtask_recovery"].high) == (0, 0)
    assert same.equal == 4
    # as many right, but not word for word: what befalls one in many may not have been met
    other = compare("quiz", answers([1, 0, 1, 1]), answers([1, 0, 1, 1], "wxyz"), 0.95)
    assert (other.equal, other.first[1].changes["dtask_recovery"].value) == (0, 0)
    assert other.first[1].changes["dtask_recovery"].low < -0.5


def test_recovery_flips_and_their_bounds() -> None:
    rng = np.random.default_rng(0)
    base = (rng.random(2000) < 0.6).astype(float)
    other = np.where(rng.random(2000) < 0.1, 1 - base, base)
    metric, one = compare("quiz", answers(base), answers(other), 0.95).first
    assert metric == "acc"
    recovery = one.changes["dtask_recovery"]
    assert recovery.value == pytest.approx(other.mean() / base.mean() - 1)
    drawn = rng.integers(0, 2000, (4000, 2000))
    ratios = other[drawn].mean(1) / base[drawn].mean(1) - 1
    assert recovery.error == pytest.approx(ratios.std(), rel=0.05)
    assert recovery.low == pytest.approx(np.quantile(ratios, 0.05), abs=0.003)
    lost, gained = int(((base == 1) & (other == 0)).sum()), int(((base == 0) & (other == 1)).sum())
    assert one.flips is not None
    assert (one.flips.base_only, one.flips.candidate_only) == (lost, gained)
    assert one.flips.p_value == pytest.approx(binomtest(lost, lost + gained).pvalue)


def test_shares_have_no_flips_and_of_nothing_nothing_is_recovered() -> None:
    report = compare("quiz", answers([0.5, 0.25, 1]), answers([0.5, 0.75, 1]), 0.95)
    assert report.first[1].flips is None
    nothing = compare("quiz", answers([0, 0, 0]), answers([0, 1, 0]), 0.95)
    assert nothing.first[1].changes.get("dtask_recovery") is None
    assert changes({"quiz": nothing})["quiz"]["dtask"].value == pytest.approx(1 / 3)


@pytest.mark.parametrize("other", [answers([1, 1], prompt="q"), answers([1, 1, 1])])
def test_other_questions_are_refused(other: Answers) -> None:
    with pytest.raises(UserError, match="is not the same for both models"):
        compare("quiz", answers([1, 1]), other, 0.95)
