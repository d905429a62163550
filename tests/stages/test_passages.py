"""The passages that changed most, against a search of every window."""

from __future__ import annotations

import math

import numpy as np
import pytest

from eaft_prune.core.types import Blocks, TokenScores
from eaft_prune.stages.passages import passages


def blocks(n: int, size: int, rng: np.random.Generator) -> Blocks:
    scored = rng.random((n, size)) < 0.7
    scored[:, 0] = False
    ids = rng.integers(0, 500, (n, size)).astype(np.int32)
    row, packs = np.zeros((n, size), np.int32), np.zeros(1, np.int32)
    return Blocks("tools", size, ids, scored, row, packs, ("tools",), "rows")


def two(some: Blocks, rng: np.random.Generator) -> list[TokenScores]:
    block = np.nonzero(some.scored_BS)[0].astype(np.int32)
    logp = [np.log(rng.random(len(block))).astype(np.float32) for _ in range(2)]
    return [TokenScores(x, np.zeros(len(x), np.float32), block) for x in logp]


@pytest.mark.parametrize("size", [24, 200])
def test_they_are_the_worst_window_of_the_worst_blocks(size: int) -> None:
    rng = np.random.default_rng(size)
    some = blocks(9, size, rng)
    base, other = two(some, rng)
    found = passages(some, base, other, lambda ids: "".join(f"<{i}>" for i in ids)).value
    d = np.zeros(some.ids_BS.shape)
    d[some.scored_BS] = base.logp_T.astype(float) - other.logp_T
    width = min(60, size)
    worst = sorted(
        (max((d[b, s : s + width].sum(), -s) for s in range(size - width + 1)), b) for b in range(9)
    )[::-1][:4]
    assert [one.change for one in found] == pytest.approx([w[0] for w, _ in worst], rel=1e-5)
    for one, ((_, start), b) in zip(found, worst, strict=True):
        span = slice(-start, -start + width)
        assert one.tokens == tuple(f"<{i}>" for i in some.ids_BS[b, span])
        for p, shown in zip(one.base, some.scored_BS[b, span], strict=True):
            assert (p is not None) == shown
        gone = sum(
            math.log(max(x, 5e-5)) - math.log(max(y, 5e-5))
            for x, y in zip(one.base, one.candidate, strict=True)
            if x is not None and y is not None
        )
        assert gone == pytest.approx(one.change, abs=2.0)  # shown to four decimals


def test_a_character_of_two_tokens_belongs_to_the_second() -> None:
    rng = np.random.default_rng(1)
    some = blocks(1, 4, rng)
    base, other = two(some, rng)
    raw = "né!".encode()  # four bytes, a token each

    def decode(ids: list[int]) -> str:
        return raw[: len(ids)].decode(errors="replace")

    (one,) = passages(some, base, other, decode).value  # type: ignore[arg-type]
    assert one.tokens == ("n", "", "é", "!")
