"""The least of ascending sizes that passes, asked of as few as can be."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def smallest_passing(sizes: Sequence[int], passes: Callable[[int], bool]) -> int | None:
    """The least size that passes, if whatever is larger than one that passes does too.

    None where none passes. Asks at most `most_asked(len(sizes))` of the sizes, none of them twice:
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


def most_asked(count: int) -> int:
    """ceil(log2(count + 1)): how many of `count` sizes a bisection asks at most."""
    return count.bit_length()
