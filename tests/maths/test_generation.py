"""Loops on made-up texts and against a naive search; paired counts against their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest

from eaft_prune.maths.generation import change, first_difference, flips, loops, ratio

RNG = np.random.default_rng(0)
PROSE = RNG.integers(0, 4000, 400).tolist()


def naive(ids: list[int]) -> bool:
    """A unit of u tokens that stands 4 times in a row, and 32 tokens of it."""
    for unit in range(1, 129):
        length = max(4 * unit, 32)
        for first in range(len(ids) - length + 1):
            part = ids[first : first + length]
            if all(part[t] == part[t - unit] for t in range(unit, length)):
                return True
    return False


MADE_UP = {
    "prose": (PROSE, False),
    "nothing": ([], False),
    "one token for ever": (PROSE[:50] + [7] * 60, True),
    "a sentence five times": (PROSE[:50] + PROSE[60:75] * 5, True),
    "three times is emphasis": (PROSE[:50] + PROSE[60:75] * 3, False),
    "a paragraph of 100 tokens": (PROSE[:20] + PROSE[100:200] * 4, True),
    "beyond the longest unit": (PROSE[:200] * 4, False),
    "and out of it again": (PROSE[:30] + PROSE[40:48] * 6 + PROSE[50:120], True),
    "a rule of dashes": (PROSE[:50] + [9] * 24 + PROSE[50:90], False),
    "a table's head": (PROSE[:9] + [1, 2, 3] * 8 + PROSE[9:40], False),
    "a counter": ([x for i in range(40) for x in (5, 6, 1000 + i)], False),
    "cut in the fourth": (PROSE[:50] + PROSE[60:90] * 3 + PROSE[60:89], False),
    "just the fourth": (PROSE[:50] + PROSE[60:90] * 4, True),
    "31 tokens": ([8] * 31, False),
    "32 tokens": ([8] * 32, True),
}


@pytest.mark.parametrize("name", MADE_UP)
def test_made_up_loops(name: str) -> None:
    ids, expected = MADE_UP[name]
    assert loops(ids) == expected
    assert naive(ids) == expected


def test_loops_against_a_naive_search() -> None:
    rng = np.random.default_rng(1)
    found = []
    for _ in range(200):
        unit = rng.integers(0, 4, rng.integers(1, 12)).tolist()
        ids = rng.integers(0, 4, 30).tolist() + (unit * 12)[: rng.integers(20, 60)]
        found.append(loops(ids))
        assert found[-1] == naive(ids)
    assert 20 < sum(found) < 180


def test_first_difference() -> None:
    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 2, 3], [1, 5, 3]) == 1
    assert first_difference([1, 2], [1, 2, 3]) == 2
    assert first_difference([], [4]) == 0


def test_flips_and_mcnemar() -> None:
    base = np.array([True] * 10 + [False] * 10)
    other = np.array([True] * 4 + [False] * 6 + [True] * 1 + [False] * 9)
    found = flips(base, other)
    assert (found.both, found.base_only, found.candidate_only, found.neither) == (4, 6, 1, 9)
    tail = sum(math.comb(7, k) for k in (0, 1)) / 2**7
    assert found.p_value == pytest.approx(2 * tail)
    assert flips(base, base).p_value == 1


def test_what_did_not_change_is_not_known_to_be_equal() -> None:
    none = np.zeros(100)
    found = change(none, none, 0.95, equal=False)
    assert found.value == 0
    assert found.high == pytest.approx(1 - 0.05 ** (1 / 100))
    assert found.low == -found.high
    same = change(none, none, 0.95, equal=True)
    assert (same.low, same.high) == (0, 0)


def test_bounds_hold_a_true_difference() -> None:
    """Loops of 3% and 7%, 400 prompts, 300 draws."""
    rng = np.random.default_rng(2)
    missed = np.zeros(2)
    for _ in range(300):
        u = rng.random(400)
        found = change((u < 0.03).astype(float), (u < 0.07).astype(float), 0.95, equal=False)
        missed += [found.high < 0.04, found.low > 0.04]
    assert (missed <= 300 * 0.09).all()


def test_ratio_of_lengths() -> None:
    base, other = np.array([10.0, 20, 30, 40]), np.array([12.0, 18, 33, 57])
    found = ratio(base, other, 0.95)
    assert found.value == pytest.approx(1.2)
    assert found.low < 1.2 < found.high
    assert ratio(base, base, 0.95).value == 1
