"""Blocks -> what one model says of every scored token: log p and H, and how far from the base."""

from __future__ import annotations

from eaft_prune.core.types import Blocks, Divergence, Likeliest, TokenScores
from eaft_prune.engines.base import Comparer, OnTokens, Scorer

VERSION = 2
LIKELIEST_VERSION = 1
DIVERGENCE_VERSION = 1


def evaluate(scorer: Scorer, blocks: Blocks, on_tokens: OnTokens) -> TokenScores:
    """Score the blocks."""
    return scorer.score(blocks, on_tokens)


def likeliest(
    scorer: Comparer, blocks: Blocks, k: int, on_tokens: OnTokens
) -> tuple[TokenScores, Likeliest]:
    """Score the blocks, and keep the k likeliest tokens for others to be compared with."""
    return scorer.likeliest(blocks, k, on_tokens)


def diverge(
    scorer: Comparer, blocks: Blocks, base: Likeliest, on_tokens: OnTokens
) -> tuple[TokenScores, Divergence]:
    """Score the blocks, and compare with the base's likeliest tokens."""
    return scorer.diverge(blocks, base, on_tokens)
