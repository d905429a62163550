"""Base and candidate token scores drawn from known smooth distributions, in dependent blocks."""

from __future__ import annotations

import numpy as np

from eaft_prune.core.types import TokenScores
from eaft_prune.maths.divergence import js2d


def pair(
    seed: int, blocks: int, tokens: int = 500, damage: float = 0.15
) -> tuple[TokenScores, TokenScores]:
    """About `blocks * tokens` tokens; with damage 0 both models have the same distribution.

    A block has its own difficulty and size. Both models' logits are the token's plus noise of their
    own; the candidate's are lower by `damage`, and it is confidently wrong more often.
    """
    rng = np.random.default_rng(seed)
    sizes = rng.integers(tokens // 2, 3 * tokens // 2, blocks)
    block = np.repeat(np.arange(blocks), sizes)
    n = len(block)
    token = rng.normal(0.5, 0.6, blocks)[block] + rng.normal(0, 1.2, n)
    fate = rng.random(n)  # the same for both, so that they are wrong at the same places
    models = []
    for loss in (0.0, damage):
        logit = token - loss + rng.normal(0, 0.5, n)
        p = 1 / (1 + np.exp(-logit))
        h = 0.75 * (1 - p) * (1 - 0.4 * p) + 0.06 * rng.normal(0, 1, n) ** 2
        wrong = fate < 0.006 + 0.02 * loss
        p = np.where(wrong, 0.08 * rng.random(n) + 1e-3, p)
        h = np.where(wrong, 0.03 * rng.random(n), h)
        models.append(
            TokenScores(
                np.log(p).astype(np.float32),
                np.clip(h, 0, 1).astype(np.float32),
                block.astype(np.int32),
            )
        )
    return models[0], models[1]


def only(scores: TokenScores, blocks: np.ndarray) -> TokenScores:
    keep = np.isin(scores.block_T, blocks)
    return TokenScores(scores.logp_T[keep], scores.entropy_T[keep], scores.block_T[keep])


def by_halves(base: TokenScores, other: TokenScores) -> float:
    """Exact where the bias is c / T, so for millions of tokens."""
    parity = base.block_T % 2
    halves = [
        js2d(*(only(s, np.unique(base.block_T[parity == odd])) for s in (base, other)))
        for odd in (0, 1)
    ]
    return float(2 * js2d(base, other) - np.mean(halves))
