"""Made-up conversations with the token scores of two models, whose loss is known."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eaft_prune.core.types import TokenScores

Values = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Drawn:
    """Conversations one after another, and two models' scores of their tokens."""

    base: TokenScores
    other: TokenScores
    row_T: Ints  # ascending


Draw = Callable[[int, np.random.Generator], Drawn]  # so many conversations


def tokens(loss_n: Values, lengths_n: Ints, rng: np.random.Generator, **how: Any) -> Drawn:
    """Conversations whose candidate loses loss_n nats a token on average.

    conflicts_n: the share of a conversation's tokens that the candidate is sure and wrong about.
    copies: how often each is there.
    """
    row = np.repeat(np.arange(len(lengths_n)), lengths_n)
    n = len(row)
    logit = rng.normal(0.8, 0.5, len(lengths_n))[row] + rng.normal(0, 1.5, n)
    logp = -np.log1p(np.exp(-logit))
    entropy = np.clip(0.75 * (1 - np.exp(logp)) + 0.1 * rng.random(n), 0, 1)
    later = logp - loss_n[row] * rng.gamma(4, 0.25, n)
    later_entropy = np.clip(0.75 * (1 - np.exp(later)) + 0.1 * rng.random(n), 0, 1)
    if (conflicts_n := how.get("conflicts_n")) is not None:
        wrong = rng.random(n) < conflicts_n[row]
        later = np.where(wrong, -4 - rng.random(n), later)
        later_entropy = np.where(wrong, 0.01 * rng.random(n), later_entropy)
    index = np.tile(np.arange(n), how.get("copies", 1))
    block = np.zeros(len(index), np.int32)
    base, other = (
        TokenScores(lp[index].astype(np.float32), h[index].astype(np.float32), block)
        for lp, h in ((logp, entropy), (later, later_entropy))
    )
    return Drawn(base, other, row[index])


def lengths(rows: int, rng: np.random.Generator, spread: float = 0.6) -> Ints:
    """Tokens a conversation, log-normal about 55."""
    return np.clip(np.exp(rng.normal(4.0, spread, rows)), 4, 4000).astype(np.int64)


def lognormal(sigma: float, spread: float = 0.6, copies: int = 1) -> Draw:
    def draw(rows: int, rng: np.random.Generator) -> Drawn:
        loss = 0.04 * np.exp(rng.normal(0, sigma, rows) - sigma**2 / 2)
        return tokens(loss, lengths(rows, rng, spread), rng, copies=copies)

    return draw


def rare(share: float, nats: float) -> Draw:
    def draw(rows: int, rng: np.random.Generator) -> Drawn:
        loss = np.where(rng.random(rows) < share, nats, 0.005)
        return tokens(loss, lengths(rows, rng), rng)

    return draw


def bursts(share: float, of_row: float) -> Draw:
    def draw(rows: int, rng: np.random.Generator) -> Drawn:
        hit = np.where(rng.random(rows) < share, of_row, 0.0)
        return tokens(np.full(rows, 0.005), lengths(rows, rng), rng, conflicts_n=hit)

    return draw


def longer(rows: int, rng: np.random.Generator) -> Drawn:
    long = lengths(rows, rng)
    return tokens(0.04 * long / 65 * rng.gamma(1, 1, rows), long, rng)


def pareto(rows: int, rng: np.random.Generator) -> Drawn:
    return tokens(0.06 * rng.pareto(2.5, rows), lengths(rows, rng), rng)


POPULATIONS: Mapping[str, Draw] = {
    "even": lognormal(0.3),
    "skewed": lognormal(1.0),
    "heavy": lognormal(1.5),
    "heavy, so are lengths": lognormal(1.5, 1.0),
    "pareto": pareto,
    "grows with length": longer,
    "six copies of each": lognormal(1.0, copies=6),
    "1% lose 6 nats": rare(0.01, 6),
    "2% lose 3 nats": rare(0.02, 3),
    "3% lose 2 nats": rare(0.03, 2),
    "conflicts in 1%": bursts(0.01, 0.3),
    "conflicts in 3%": bursts(0.03, 0.1),
}
