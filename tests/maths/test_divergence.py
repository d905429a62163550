"""JS2D from pairs of rows: its formula, and that it does not depend on the sample size."""

from __future__ import annotations

import math
from collections import Counter, defaultdict

import numpy as np
import pytest
from support.pairs import by_halves, only, pair

from eaft_prune.core.types import TokenScores
from eaft_prune.maths.divergence import H_BINS, P_BINS, Apart, cells, js2d, js2d_corrected

LN2 = math.log(2)


def corrected(base: TokenScores, other: TokenScores) -> Apart:
    """Of a conversation a block."""
    return js2d_corrected(base, other, base.block_T.astype(np.int64))


def error_of(apart: Apart) -> float:
    assert apart.influence_n is not None
    n = len(apart.influence_n)
    return math.sqrt(float(np.sum(apart.influence_n**2)) / (n * (n - 1)))


def naive(base: TokenScores, other: TokenScores, phi: dict[int, float]) -> float:
    """The double sum over pairs of different blocks, cell by cell."""
    counts: dict[int, Counter[int]] = defaultdict(Counter)
    size: Counter[int] = Counter()
    for scores, sign in ((base, 1), (other, -1)):
        places = cells(scores.p_T, scores.entropy_T).tolist()
        for cell, block in zip(places, scores.block_T.tolist(), strict=True):
            counts[cell][block] += sign
            size[cell] += 1
    total = 0.0
    for cell, d in counts.items():
        products = sum(d[a] * d[b] for a in d for b in d if a != b)
        if size[cell] > 1:
            total += phi[cell] * products / (size[cell] - 1)
    blocks = len(np.unique(base.block_T))
    return blocks / (blocks - 1) * total / (4 * len(base))


def phis(base: TokenScores, other: TokenScores) -> dict[int, float]:
    """phi of every occupied cell, from the 8 x 8 cells around it, over the share not alone."""
    sides = [cells(s.p_T, s.entropy_T).tolist() for s in (base, other)]

    def area(cell: int) -> tuple[int, int]:
        return cell // H_BINS // 8, cell % H_BINS // 8

    a, b = (Counter(map(area, side)) for side in sides)
    found = {}
    for cell in {*sides[0], *sides[1]}:
        n, m = a[area(cell)], b[area(cell)]
        x = abs(n - m) / (n + m)
        if x in (0, 1):
            found[cell] = 2 * LN2 if x else 1.0
        else:
            found[cell] = ((1 + x) * math.log(1 + x) + (1 - x) * math.log(1 - x)) / x**2
    size = Counter([*sides[0], *sides[1]])
    alone = sum(n == 1 for n in size.values()) / size.total()
    return {cell: value / (1 - alone) for cell, value in found.items()}


@pytest.mark.parametrize("seed", range(4))
def test_it_is_the_sum_over_pairs_of_blocks_with_its_jackknife_error(seed: int) -> None:
    base, other = pair(seed, blocks=6, tokens=400, damage=0.4 * seed)
    phi = phis(base, other)
    found = corrected(base, other)
    assert found.value == pytest.approx(naive(base, other, phi), rel=1e-6, abs=1e-9)
    without = [
        naive(*(only(s, np.delete(np.arange(6), gone)) for s in (base, other)), phi)
        for gone in range(6)
    ]
    error = math.sqrt(5 / 6 * sum((x - np.mean(without)) ** 2 for x in without))
    assert error_of(found) == pytest.approx(error, rel=1e-6)
    assert found.influence_n is not None
    assert found.influence_n.sum() == pytest.approx(0, abs=1e-9)


def test_block_numbers_are_names() -> None:
    base, other = pair(0, blocks=8, tokens=400)
    moved = [TokenScores(s.logp_T, s.entropy_T, 7 * (9 - s.block_T)) for s in (base, other)]
    found, again = corrected(base, other), corrected(moved[0], moved[1])
    assert again.value == pytest.approx(found.value, rel=1e-12)
    assert error_of(again) == pytest.approx(error_of(found), rel=1e-9)


def test_of_a_model_with_itself_it_is_0() -> None:
    base, _ = pair(0, blocks=5)
    found = corrected(base, base)
    assert (found.value, error_of(found)) == (0, 0)


def test_of_models_that_share_no_bin_it_is_ln_2() -> None:
    """Also where half of the bins are nearly empty: 4,000 tokens in 9,600 bins a side."""
    rng = np.random.default_rng(0)
    block = (np.arange(4000) // 100).astype(np.int32)
    h = rng.random(4000).astype(np.float32)
    low, high = (
        TokenScores(np.log(p).astype(np.float32), h, block)
        for p in (0.001 + 0.49 * rng.random(4000), 0.51 + 0.48 * rng.random(4000))
    )
    dense = [TokenScores(s.logp_T, np.round(s.entropy_T, 1), block) for s in (low, high)]
    assert corrected(dense[0], dense[1]).value == pytest.approx(LN2, rel=0.05)


def test_one_block_gives_the_plain_value_and_no_error() -> None:
    base, other = pair(0, blocks=1)
    found = corrected(base, other)
    assert found.value == js2d(base, other)
    assert found.influence_n is None
    assert corrected(*pair(0, blocks=2)).influence_n is None


@pytest.mark.slow
def test_plain_falls_with_the_number_of_tokens_and_corrected_does_not() -> None:
    """10,000 to 1,000,000 tokens of one pair of distributions; the truth is that of 3,000,000."""
    whole = pair(1, blocks=2_000, tokens=1_500, damage=0.3)
    truth = by_halves(*whole)
    assert 0.005 < truth < 0.01
    plain, off = [], []
    for blocks in (7, 20, 70, 200, 670):  # of 1,500 tokens
        base, other = (only(s, np.arange(blocks) + 5) for s in whole)
        found = corrected(base, other)
        plain.append(js2d(base, other))
        off.append((found.value - truth) / error_of(found))
    assert plain == sorted(plain, reverse=True)
    assert plain[0] > 10 * truth
    assert plain[-1] > 1.1 * truth
    assert max(map(abs, off)) < 2.5, off


def test_without_a_difference_it_is_0_on_average_at_any_size() -> None:
    for blocks, tokens, draws in ((10, 400, 60), (40, 500, 25)):
        found = [corrected(*pair(s, blocks, tokens, damage=0)) for s in range(draws)]
        values = np.array([one.value for one in found])
        assert abs(values.mean()) < 3 * values.std() / math.sqrt(draws)
        assert js2d(*pair(0, blocks, tokens, damage=0)) > 5 * values.std()
        # the jackknife errs on the large side here, by sqrt(2) at most
        assert 0.8 < np.mean([error_of(one) for one in found]) / values.std() < 1.8


def test_bins_are_those_between_the_edges_themselves() -> None:
    rng = np.random.default_rng(0)
    places = []
    for bins in (P_BINS, H_BINS):
        edges = np.linspace(0.0, 1.0, bins + 1)
        beside = [np.nextafter(edges, to) for to in (-1.0, 2.0)]
        places.append(np.concatenate([edges, *beside, rng.random(2_000), [1 + 1e-6, -1e-6]]))
    p, h = places[0], np.resize(places[1], len(places[0]))
    for values, bins, stride, kind in ((p, P_BINS, H_BINS, float), (h, H_BINS, 1, np.float32)):
        same = values.astype(kind)
        pair_of = (same, np.zeros(len(same))) if bins == P_BINS else (np.zeros(len(same)), same)
        edges = np.linspace(0.0, 1.0, bins + 1)
        expected = [min(max(sum(e <= v for e in edges) - 1, 0), bins - 1) for v in same.tolist()]
        assert (cells(*pair_of) // stride).tolist() == expected


def test_the_plain_number_is_that_of_the_histograms() -> None:
    base, other = pair(5, blocks=12, tokens=300, damage=0.5)
    for some in ((base, other), (only(base, 0), only(other, 0))):
        assert corrected(*some).plain == js2d(*some)
