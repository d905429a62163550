"""What models write: the prompts, and what came after them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from eaft_prune.core.verdict import Changes


@dataclass(frozen=True)
class Prompts:
    """P conversations up to an assistant's turn, short ones first."""

    ids_N: NDArray[np.int32]  # one after the other
    ends_P: NDArray[np.int64]
    pack_P: NDArray[np.int32]  # index into `packs`
    packs: tuple[str, ...]
    answers: tuple[str | None, ...]  # what each turn should answer, where its row says so

    def __len__(self) -> int:
        return len(self.ends_P)

    @property
    def lists(self) -> list[list[int]]:
        return split(self.ids_N, self.ends_P)


@dataclass(frozen=True)
class Written:
    """What one model wrote after P prompts, one after the other."""

    ids_N: NDArray[np.int32]
    ends_P: NDArray[np.int64]
    ended_P: NDArray[np.bool_]  # by itself, before the limit

    @property
    def lists(self) -> list[list[int]]:
        return split(self.ids_N, self.ends_P)


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen, and where writing ends."""

    max_new_tokens: int
    stops: tuple[tuple[int, ...], ...]  # ids that end it, in this order
    seed: int | None = None  # None: the likeliest
    temperature: float = 1.0


@dataclass(frozen=True)
class Text:
    """One answer, as people read it."""

    text: str
    ended: bool
    loops: bool
    well_formed: bool
    right: bool | None = None  # None: nobody says what is


@dataclass(frozen=True)
class Pair:
    """What base and candidate wrote after one prompt."""

    pack: str
    decoding: str  # greedy, or seed N
    prompt: str
    base: Text
    candidate: Text
    first_difference: int | None  # tokens they share before; None: they are equal


@dataclass(frozen=True)
class Flips:
    """A yes or no of every prompt, of both models, under greedy decoding."""

    both: int
    base_only: int
    candidate_only: int
    neither: int
    p_value: float  # McNemar's exact test


@dataclass(frozen=True)
class GenerationReport:
    """What a candidate wrote beside its base."""

    base: Mapping[str, float]  # by name: loop_rate, ended_rate, well_formed_rate, tokens
    candidate: Mapping[str, float]
    changes: Changes  # of the same names with a d, length_ratio, agreement; rows are prompts
    flips: Mapping[str, Flips]
    answered: Changes | None  # dtask_accuracy, over the prompts whose answer is known
    median_first_difference: float | None  # tokens, of those that differ
    pairs: Sequence[Pair] = field(default_factory=tuple)


def ended_at(ids: Sequence[int], stops: Sequence[Sequence[int]]) -> int | None:
    """How many tokens were written until the first stop; None: nothing stopped it.

    A stop of one token ends what was written, a longer one is no part of it.
    """
    for end in range(1, len(ids) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if tuple(ids[max(end - len(stop), 0) : end]) == tuple(stop):
                return end - len(stop) if len(stop) > 1 else end
    return None


def split(ids_N: NDArray[np.int32], ends_P: NDArray[np.int64]) -> list[list[int]]:
    """The lists that were put one after the other."""
    return [part.tolist() for part in np.split(ids_N, ends_P[:-1])]


def joined(lists: Sequence[Sequence[int]]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Lists one after the other, and where each ends."""
    ids = np.array([i for some in lists for i in some], np.int32)
    return ids, np.cumsum([len(some) for some in lists]).astype(np.int64)
