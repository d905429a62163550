"""The least of ascending sizes that passes, asked of as few as can be."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def smallest_passing(sizes: Sequence[int], passes: Callable[[int], bool]) -> int | None:
    """The least size that passes, if whatever is larger than one that passes does too.

    None where none passes. Asks at most ceil(log2(len(sizes) + 1)) sizes, none of them twice:
    the answer, and the size below it, if there is one, were both asked.
    """
    low, high = 0, len(sizes)
    while low < high:
        middle = (low + high) // 2
        if passes(sizes[middle]):
            high = middle
        else:
            low = middle + 1
    return sizes[low] if low < len(sizes) else None


def furthest_down(sizes: Sequence[int], passes: Callable[[int], bool]) -> int | None:
    """The same where few sizes are expected to pass: asked from the largest down.

    Steps double until one fails (Bentley and Yao, 1976), what lies between is bisected: one size is
    asked where none passes, about 2 log2 of the number that pass otherwise.
    """
    known, step = len(sizes), 1
    while known and passes(sizes[max(known - step, 0)]):
        known = max(known - step, 0)
        step *= 2
    between = sizes[max(known - step, 0) + 1 : known] if known else ()
    within = smallest_passing(between, passes)
    return within if within is not None else sizes[known] if known < len(sizes) else None


def most_asked(count: int) -> int:
    """How many of `count` sizes either of the two asks at most."""
    return 2 * count.bit_length()
