"""How sure a comparison is: conversations are what was drawn, so they are what is counted.

Tokens of a conversation depend on each other and may lie in several blocks; conversations (rows of
a pack) do not, and equal ones are one. A change is a mean over them, as far as its influence values
go (Hampel, JASA 69, 1974; Cochran, Sampling Techniques, 1977, section 6.4, for ratios of sums), and
its bounds are Student's, with one more conversation that nobody has seen: `IMAGINED` times as far
off as the worst that was. That is what skew and a heavy tail may still hold back, where resampling
only repeats what is there. docs/statistics.md has what was simulated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from eaft_prune.core.types import TokenScores
from eaft_prune.core.verdict import Changes, Estimate
from eaft_prune.maths.divergence import Apart
from eaft_prune.maths.metrics import METRICS, Metric, distances

IMAGINED = 3.0  # times the largest deviation; 2 misses up to 10% of the heaviest tails simulated
LEAST_ROWS = 8  # the spread of fewer says nothing
LEAST_BLOCKS = 4  # as LEAST_ROWS, where a search compares blocks

Ints = NDArray[np.int64]
Values = NDArray[np.float64]


def changes(
    base: TokenScores,
    other: TokenScores,
    row_T: NDArray[np.integer],
    cc_quantile: float,
    *,
    confidence: float | None,
    metrics: Sequence[Metric] = METRICS,
    apart: Mapping[str, Apart] | None = None,
) -> Changes | None:
    """Candidate minus base with standard errors and bounds; None below 8 rows or confidence None.

    row_T: the conversation of every token. apart: the `distances` of the two, where they are known.
    A metric whose influence is unknown (JS2D where most
    tokens are alone in their bins) is left out. Equal token scores are changes of exactly 0 +- 0
    whatever the number of rows.
    """
    if confidence is None:
        return None
    unit_T = np.asarray(np.unique(row_T, return_inverse=True)[1], np.int64)
    n_rows = int(unit_T.max()) + 1
    if apart is None:
        apart = distances(base, other, unit_T, metrics)
    metrics = [m for m in metrics if m.distance is None or m.name in apart]  # what was measured
    if _equal(base, other):
        return Changes(n_rows, dict.fromkeys(_names(metrics), Estimate(0.0, 0.0, 0.0, 0.0)))
    if n_rows < LEAST_ROWS:
        return None
    found: dict[str, Estimate] = {}
    for metric in metrics:
        if metric.distance is None:
            named = _changed(metric, base, other, unit_T, cc_quantile)
        else:
            named = {metric.change: (apart[metric.name].value, apart[metric.name].influence_n)}
        for name, (value, influence) in named.items():
            if influence is None:
                continue
            estimate = of_influence(value, influence, confidence, metric.burst)
            if metric.distance is not None:  # never below 0
                least = {"low": max(estimate.low, 0.0), "high": max(estimate.high, 0.0)}
                estimate = Estimate(**{**vars(estimate), **least})
            found[name] = estimate
    return Changes(n_rows, found)


def of_influence(
    value: float, influence_n: Values, confidence: float, burst: float = 0.0
) -> Estimate:
    """A number with its error and bounds, from how far each row pulls it (mean 0, [n]).

    error^2 = sum influence^2 / (n (n - 1)).
    """
    n = len(influence_n)
    error = math.sqrt(float(np.sum(influence_n**2)) / (n * (n - 1)))
    most, least = max(float(influence_n.max()), 0.0), min(float(influence_n.min()), 0.0)
    estimate = Estimate(value, error, value, value, most, least, burst)
    low, high = bounds(estimate, n, confidence)
    return Estimate(value, error, low, high, most, least, burst)


def bounds(estimate: Estimate, rows: int, confidence: float) -> tuple[float, float]:
    """One-sided bounds on either side, each with this confidence, of an estimate over n rows.

    high = v + m / (n + 1) + t s', m = IMAGINED times the highest influence, s'^2 the variance of
    the mean of the n rows and one more with influence m, t Student's with n degrees of freedom; low
    alike with the lowest. Where a row's change is rare (burst), neither is nearer than what rows
    too rare to have been seen may add: (1 - alpha^(1/n)) burst.
    """
    squares = estimate.error**2 * rows * (rows - 1)
    t = student(confidence, rows + 1)
    least = unseen(rows, confidence) * estimate.burst
    reach = []
    for extreme in (-estimate.lowest, estimate.highest):
        more = IMAGINED * extreme
        mean = more / (rows + 1)
        variance = (squares + more**2 - (rows + 1) * mean**2) / rows
        reach.append(max(mean + t * math.sqrt(max(variance, 0.0) / (rows + 1)), least))
    return estimate.value - reach[0], estimate.value + reach[1]


def unseen(rows: int, confidence: float) -> float:
    """The largest share of conversations of which n may hold none, with this confidence.

    1 - alpha^(1/n), about 3/n at 95% (Hanley and Lippman-Hand, JAMA 249, 1983).
    """
    return -math.expm1(math.log1p(-confidence) / rows)


def least_rows(rarest: float, confidence: float) -> int:
    """Rows that hold one of a kind with this confidence, if a share `rarest` of all is of it."""
    return math.ceil(math.log1p(-confidence) / math.log1p(-rarest))


def ratio_variance(change_xB: Values, tokens_B: Ints) -> tuple[Values, Values]:
    """sum(change) / sum(tokens) over blocks, and the variance of its numerator about it, [...].

    That of the ratio estimator (Cochran, Sampling Techniques, 1977, section 6.4): the square root
    over sum(tokens) is the standard error. Changes are [..., B].
    """
    n = len(tokens_B)
    ratio_x = change_xB.sum(axis=-1) / tokens_B.sum()
    rest_xB = change_xB - ratio_x[..., None] * tokens_B
    return ratio_x, (rest_xB**2).sum(axis=-1) / (n - 1) * n


def student(probability: float, n: int) -> float:
    """Quantile of Student's t with n - 1 degrees of freedom."""
    from scipy.special import stdtrit  # here, because importing it takes a third of a second

    return float(stdtrit(n - 1, probability))


def _changed(
    metric: Metric, base: TokenScores, other: TokenScores, row_T: Ints, cc_quantile: float
) -> dict[str, tuple[float, Values | None]]:
    """Each change of a number that is judged: its value and influence."""
    b, o = (metric.of(scores, base, cc_quantile) for scores in (base, other))
    b_n, o_n = (metric.pull(scores, row_T, cc_quantile) for scores in (base, other))
    found: dict[str, tuple[float, Values | None]] = {metric.change: (o - b, o_n - b_n)}
    if metric.relative_limit is not None:
        found[metric.relative_change] = (o / b - 1, o_n / b - o * b_n / b**2)
    return found


def _names(metrics: Sequence[Metric]) -> list[str]:
    """Of every change: the absolute one, and the relative one where there is a limit to it."""
    both = [(m.change, None if m.relative_limit is None else m.relative_change) for m in metrics]
    return [name for names in both for name in names if name is not None]


def _equal(a: TokenScores, b: TokenScores) -> bool:
    same = np.array_equal(a.logp_T, b.logp_T) and np.array_equal(a.entropy_T, b.entropy_T)
    return same and not (b.kl_T is not None and b.kl_T.any())
