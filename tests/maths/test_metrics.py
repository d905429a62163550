"""Metrics against their formulas; nothing and NaN raise."""

from __future__ import annotations

import bisect
import math
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eaft_prune.core.types import TokenScores
from eaft_prune.maths.divergence import histogram2d, js2d, js2d_corrected, js_divergence
from eaft_prune.maths.formulas import (
    cc_rate,
    cc_rate_below,
    lowest_share,
    perplexity,
    thresholds,
)
from eaft_prune.maths.metrics import pack_report

LN2 = math.log(2)


def scores(p: Any, h: Any, block: Any = None) -> TokenScores:
    p, h = np.array(p, float), np.array(h, np.float32)
    block = np.arange(len(p)) // 5 if block is None else np.array(block)
    return TokenScores(np.log(p).astype(np.float32), h, block.astype(np.int32))


def drawn(tokens: int, seed: int, blocks: int = 8, tilt: float = 0.0) -> TokenScores:
    rng = np.random.default_rng(seed)
    p = np.clip(rng.beta(0.6 + tilt, 0.8, tokens), 1e-4, 1)
    h = np.clip(0.7 * (1 - p) + 0.2 * rng.random(tokens), 0, 1)
    return scores(p, h, np.arange(tokens) * blocks // tokens)


POINTS = st.lists(st.tuples(st.floats(1e-3, 1), st.floats(0, 1, width=32)), min_size=1, max_size=30)


def naive_js(a: TokenScores, b: TokenScores) -> float:
    """JS over a dictionary of occupied bins; edges k/160 and k/120, the last bin closed."""

    def cell(p: float, h: float) -> tuple[int, int]:
        place = []
        for value, bins in ((p, 160), (h, 120)):
            edges = np.linspace(0, 1, bins + 1).tolist()
            place.append(min(bisect.bisect_right(edges, value) - 1, bins - 1))
        return place[0], place[1]

    sides = []
    for s in (a, b):
        cells = [cell(float(p), float(h)) for p, h in zip(s.p_T, s.entropy_T, strict=True)]
        sides.append({c: n / len(cells) for c, n in Counter(cells).items()})
    total = 0.0
    for place in {*sides[0], *sides[1]}:
        p, q = (side.get(place, 0.0) for side in sides)
        m = (p + q) / 2
        total += sum(x * math.log(x / m) for x in (p, q) if x > 0) / 2
    return total


@given(POINTS)
def test_ppl_and_means_are_their_formulas(points: list[tuple[float, float]]) -> None:
    s = scores(*zip(*points, strict=True))
    report = pack_report(s, s, 0.15)
    logp = [float(x) for x in s.logp_T]
    assert report.ppl == pytest.approx(math.exp(-math.fsum(logp) / len(logp)), rel=1e-9)
    probs = [math.exp(x) for x in logp]
    assert report.mean_prob == pytest.approx(math.fsum(probs) / len(probs), rel=1e-9)
    mean = math.fsum(float(x) for x in s.entropy_T) / len(points)
    assert report.mean_entropy == pytest.approx(mean, rel=1e-9, abs=1e-12)
    assert report.scored_tokens == len(points)
    assert report.blocks == len({i // 5 for i in range(len(points))})


def test_ppl_of_a_uniform_guess_is_the_number_of_choices() -> None:
    assert perplexity(np.full(7, -math.log(50))) == pytest.approx(50)


@given(POINTS, POINTS, st.floats(0.01, 0.99))
def test_cc_is_its_formula(
    points: list[tuple[float, float]], other: list[tuple[float, float]], q: float
) -> None:
    """Own thresholds for cc_rate, ties at them in part; the base model's for cc_rate_base_thr."""
    n = min(len(points), len(other))
    s, base = (scores(*zip(*x[:n], strict=True)) for x in (points, other))

    def below(of: TokenScores, thr: TokenScores) -> float:
        p_q = float(np.quantile(np.exp(thr.logp_T.astype(float)), q))
        h_q = float(np.quantile(thr.entropy_T.astype(float), q))
        hits = [
            math.exp(float(lp)) <= p_q * (1 + 1e-15) and float(h) <= h_q
            for lp, h in zip(of.logp_T, of.entropy_T, strict=True)
        ]
        return sum(hits) / len(hits)

    def lowest(values: list[float]) -> list[Fraction]:
        """How often each is among the lowest, if ties are ordered at random."""
        count = int(q * (len(values) - 1)) + 1
        last = sorted(values)[count - 1]
        places = count - sum(v < last for v in values)
        return [
            Fraction(1)
            if v < last
            else Fraction(places, values.count(last))
            if v == last
            else Fraction(0)
            for v in values
        ]

    ours = [
        x * y for x, y in zip(lowest(s.logp_T.tolist()), lowest(s.entropy_T.tolist()), strict=True)
    ]
    report = pack_report(s, base, q)
    assert report.cc_rate == pytest.approx(float(sum(ours) / n))
    assert report.cc_rate_base_thr == pytest.approx(below(s, base))
    if len(set(s.logp_T.tolist())) == len(set(s.entropy_T.tolist())) == n:
        assert report.cc_rate == pytest.approx(below(s, s))


def test_cc_counts_tokens_on_both_thresholds() -> None:
    p, h = np.array([0.1, 0.2, 0.3]), np.array([0.3, 0.2, 0.1], np.float32)
    assert cc_rate(p, h, 0.5) == pytest.approx(1 / 3)  # only the middle token
    assert cc_rate(p, h, 1.0) == 1.0
    assert cc_rate(p, h, 0.1) == 0.0
    assert cc_rate_below(p, h, 0.2, float(h[1])) == pytest.approx(1 / 3)
    assert cc_rate_below(p, h, 0.3, 1.0) == 1.0
    assert cc_rate_below(p, h, 0.0999, 1.0) == 0.0


@given(st.lists(st.integers(0, 4), min_size=1, max_size=30), st.floats(0.01, 0.99))
def test_the_lowest_share_is_as_many_as_the_quantile_says(ranks: list[int], q: float) -> None:
    """Ties at the last of them in part: the mean over all orders in which they may be sorted."""
    values = np.array(ranks, float)
    share = lowest_share(values, q)
    count = int(q * (len(ranks) - 1)) + 1
    assert share.sum() == pytest.approx(count)
    orders = [np.lexsort((np.random.default_rng(s).random(len(values)), values)) for s in range(60)]
    taken = np.mean([np.isin(np.arange(len(values)), order[:count]) for order in orders], axis=0)
    assert np.abs(share - taken).max() < 0.35  # of 60 orders
    assert set(share[taken == 0]) <= {0.0}
    assert set(share[taken == 1]) <= {1.0} or share[taken == 1].min() > 0.8


def test_a_rounding_of_equal_probabilities_decides_little() -> None:
    """85% of p are exactly 1; 200 of 10,000 move by 1e-6: their share at most, not 83%."""
    rng = np.random.default_rng(0)
    p = np.where(np.arange(10_000) < 8_500, 1.0, rng.random(10_000))
    h = rng.random(10_000).astype(np.float32)
    before = cc_rate(p, h, 0.15)
    for moved in (slice(0, 200), slice(8_300, 8_500)):
        other = p.copy()
        other[moved] -= 1e-6
        assert abs(cc_rate(other, h, 0.15) - before) <= 0.02


@given(POINTS, POINTS)
def test_js2d_is_its_formula_symmetric_and_bounded(
    points: list[tuple[float, float]], other: list[tuple[float, float]]
) -> None:
    a, b = scores(*zip(*points, strict=True)), scores(*zip(*other, strict=True))
    value = js2d(a, b)
    assert value == pytest.approx(naive_js(a, b), abs=1e-9)
    assert value == pytest.approx(js2d(b, a), abs=1e-12)
    assert 0 <= value <= LN2


def test_js2d_of_a_model_with_itself_is_0() -> None:
    s = drawn(1000, 0)
    assert js2d(s, s) == 0


def test_js2d_of_models_that_share_no_bin_is_ln_2() -> None:
    a, b = scores([0.9] * 6, [0.1] * 6), scores([0.1] * 9, [0.1] * 9)
    assert js2d(a, b) == pytest.approx(LN2)


def test_js2d_of_a_known_case() -> None:
    """P = (1, 0), Q = (1/2, 1/2), M = (3/4, 1/4)."""
    a, b = scores([0.9, 0.9], [0.1, 0.1]), scores([0.9, 0.1], [0.1, 0.1])
    expected = (math.log(4 / 3) + 0.5 * math.log(2 / 3) + 0.5 * math.log(2)) / 2
    assert js2d(a, b) == pytest.approx(expected)


def test_js2d_does_not_depend_on_the_number_of_tokens_of_a_distribution() -> None:
    a, b = drawn(300, 1), drawn(200, 2)
    twice = scores(np.tile(a.p_T, 2), np.tile(a.entropy_T, 2))
    assert js2d(twice, b) == pytest.approx(js2d(a, b), abs=1e-9)


def test_the_axes_are_p_and_entropy() -> None:
    counts = histogram2d(np.array([0.999, 0.0, 1.0]), np.array([0.0, 0.999, 1.0], np.float32))
    assert counts.shape == (160, 120)
    assert {tuple(place) for place in np.argwhere(counts).tolist()} == {
        (159, 0), (0, 119), (159, 119),
    }  # fmt: skip
    assert counts.sum() == 3


def test_every_token_is_in_a_bin_also_just_outside_the_square() -> None:
    h = np.array([-1e-7, 1 + 1e-6, 0.5], np.float32)
    assert histogram2d(np.array([1 + 1e-7, 0.0, 0.5]), h).sum() == 3


def test_a_report_compares_with_the_base() -> None:
    base, other = drawn(2000, 1), drawn(2000, 2, tilt=0.3)
    report = pack_report(other, base, 0.15)
    assert report.js2d == js2d(base, other) > 0
    rows = base.block_T.astype(np.int64)
    assert report.js2d_corrected == js2d_corrected(base, other, rows).value
    assert pack_report(base, base, 0.15).js2d == 0


def test_permuting_tokens_changes_no_report() -> None:
    base, other = drawn(500, 1), drawn(500, 2)
    order = np.random.default_rng(0).permutation(500)
    moved = [
        TokenScores(s.logp_T[order], s.entropy_T[order], s.block_T[order]) for s in (base, other)
    ]
    one, two = pack_report(other, base, 0.15), pack_report(moved[1], moved[0], 0.15)
    numbers = one.values()
    assert len(numbers) >= 11
    for name, value in numbers.items():
        assert two.values()[name] == pytest.approx(value, rel=1e-9, abs=1e-12), name


@pytest.mark.parametrize(
    ("p", "h"),
    [
        ([], []),
        ([0.5, math.nan], [0.5, 0.5]),
        ([0.5, 0.0], [0.5, 0.5]),
        ([0.5, math.inf], [0.5, 0.5]),
        ([0.5, 1.1], [0.5, 0.5]),
        ([0.5, 0.5], [0.5, math.nan]),
        ([0.5, 0.5], [0.5, 1.5]),
        ([0.5, 0.5], [0.5, -0.5]),
        ([0.5, 0.5], [0.5, math.inf]),
    ],
    ids=["nothing", "p nan", "p 0", "p inf", "p > 1", "H nan", "H > 1", "H < 0", "H inf"],
)
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_scores_that_are_none_raise_on_either_side(p: list[float], h: list[float]) -> None:
    bad, good = scores(p, h), scores([0.5] * len(p), [0.5] * len(p))
    with pytest.raises(ValueError, match="candidate"):
        pack_report(bad, good, 0.15)
    with pytest.raises(ValueError, match="base" if len(p) else "candidate"):
        pack_report(good, bad, 0.15)


def test_scores_of_different_tokens_raise() -> None:
    a = scores([0.5] * 4, [0.5] * 4, [0, 0, 1, 1])
    for other in (
        scores([0.5] * 5, [0.5] * 5, [0, 0, 1, 1, 1]),
        scores([0.5] * 4, [0.5] * 4, [0, 1, 1, 1]),
    ):
        with pytest.raises(ValueError, match="different tokens"):
            pack_report(a, other, 0.15)
        with pytest.raises(ValueError, match="different tokens"):
            pack_report(other, a, 0.15)


def test_arrays_of_different_lengths_raise() -> None:
    a = scores([0.5] * 4, [0.5] * 4)
    for name in ("logp_T", "entropy_T", "block_T"):
        ragged = TokenScores(**{**vars(a), name: getattr(a, name)[:-1]})
        with pytest.raises(ValueError, match="length"):
            pack_report(ragged, ragged, 0.15)


NOTHING = np.zeros(0)
NAN = np.array([0.5, math.nan])
FINE = np.array([0.5, 0.5])


@pytest.mark.parametrize(
    "measure",
    [
        lambda x: perplexity(x),
        lambda x: thresholds(x, np.full(len(x), 0.5), 0.15),
        lambda x: thresholds(np.full(len(x), 0.5), x, 0.15),
        lambda x: cc_rate(x, np.full(len(x), 0.5), 0.5),
        lambda x: cc_rate(np.full(len(x), 0.5), x, 0.5),
        lambda x: js_divergence(x, np.ones(len(x))),
        lambda x: js_divergence(np.ones(len(x)), x),
        lambda x: js2d(scores(x, np.full(len(x), 0.5)), scores(FINE, FINE)),
        lambda x: js2d(scores(FINE, FINE), scores(np.full(len(x), 0.5), x)),
    ],
    ids=["ppl", "p_q", "h_q", "cc p", "cc H", "js a", "js b", "js2d p", "js2d H"],
)
@pytest.mark.parametrize("values", [NOTHING, NAN], ids=["nothing", "nan"])
@pytest.mark.filterwarnings("ignore")
def test_every_metric_raises_on_nothing_and_on_nan(
    measure: Callable[[Any], Any], values: np.ndarray[Any, Any]
) -> None:
    """The module promises it of all of them."""
    with pytest.raises(ValueError):  # noqa: PT011 - each names its own
        measure(values)
