"""The CC rate's influence against a loop that sorts every token, ties and all."""

from __future__ import annotations

import numpy as np
import pytest

from eaft_prune.core.types import TokenScores
from eaft_prune.maths.formulas import lowest_share
from eaft_prune.maths.influence import of_cc_rate


def near(values: list[float], share: list[float], quantile: float) -> float:
    """Mean share of the tokens about the quantile, of all tokens sorted."""
    order = sorted(range(len(values)), key=lambda t: values[t])
    centre, width = int(quantile * (len(values) - 1)), max(len(values) // 100, 16)
    window = order[max(centre - width, 0) : centre + width]
    return float(np.mean([share[t] for t in window]))


@pytest.mark.parametrize(("tokens", "steps"), [(5, 3), (40, 7), (900, 4), (4_000, 10_000)])
@pytest.mark.parametrize("quantile", [0.01, 0.15, 0.99])
def test_influence_of_the_cc_rate(tokens: int, steps: int, quantile: float) -> None:
    rng = np.random.default_rng(tokens)
    p, h = ((1 + rng.integers(steps, size=tokens)) / (steps + 1) for _ in range(2))
    row = np.arange(tokens) // 3
    scores = TokenScores(np.log(p).astype(np.float32), h.astype(np.float32), row.astype(np.int32))
    p, h = scores.p_T, scores.entropy_T.astype(np.float64)
    a, b = lowest_share(p, quantile), lowest_share(h, quantile)
    pull = a * b
    pull -= near(p.tolist(), b.tolist(), quantile) * a
    pull -= near(h.tolist(), a.tolist(), quantile) * b
    rest = pull - pull.mean()
    n = row[-1] + 1
    expected = [n * rest[row == i].sum() / tokens for i in range(n)]
    assert of_cc_rate(scores, row, quantile) == pytest.approx(expected, abs=1e-12)
