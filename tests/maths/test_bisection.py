"""The least size that passes, against a look at every size."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eaft_prune.maths.bisection import furthest_down, most_asked, smallest_passing


@pytest.mark.parametrize("search", [smallest_passing, furthest_down])
@given(st.sets(st.integers(1, 200), max_size=40), st.integers(0, 201))
def test_it_is_the_first_of_all_that_pass_and_few_are_asked(
    search: Callable[[list[int], Callable[[int], bool]], int | None], sizes: set[int], least: int
) -> None:
    ascending = sorted(sizes)
    asked: list[int] = []

    def passes(size: int) -> bool:
        asked.append(size)
        return size >= least

    found = search(ascending, passes)
    assert found == next((size for size in ascending if size >= least), None)
    assert len(asked) == len(set(asked)) <= most_asked(len(ascending))
    if found is not None:  # known to be the least: it was asked, and so was the one below it
        below = ascending[: ascending.index(found)]
        assert {found, *below[-1:]} <= set(asked)
    elif search is furthest_down:
        assert asked == ascending[-1:]  # nothing more is spent on what is hopeless
