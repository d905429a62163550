"""Scores, likeliest tokens and divergence by a server that tells the likeliest of every token."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np

from eaft_prune.core.types import Blocks, Divergence, Likeliest, TokenScores
from eaft_prune.engines.base import OnTokens
from eaft_prune.engines.servers.scoring import Floats, Told
from eaft_prune.maths.kl import kl_of_told, rest_of

Scored = tuple[Floats, Floats]  # ln p and normalised entropy


class ServerComparer(ABC):
    """Everything that a Comparer does with blocks, but for how a server is asked."""

    vocab_size: int
    entropy_top_k: int

    @abstractmethod
    def told(self, blocks: Blocks, k: int, on_tokens: OnTokens) -> Iterator[Told]:
        """Of every scored token ln p and the k likeliest, some blocks at a time."""

    def score(self, blocks: Blocks, on_tokens: OnTokens) -> TokenScores:
        """log p and H of every scored token; raises UserError unless the server gave them all."""
        parts = self.told(blocks, self.entropy_top_k, on_tokens)
        return _joined(blocks, [self._scored(part) for part in parts])

    def likeliest(
        self, blocks: Blocks, k: int, on_tokens: OnTokens
    ) -> tuple[TokenScores, Likeliest]:
        """The same, and the k likeliest tokens at every scored place."""
        k = min(k, self.vocab_size)
        narrow = np.uint16 if self.vocab_size <= 1 << 16 else np.int32
        scored, kept = [], []
        for part in self.told(blocks, max(k, self.entropy_top_k), on_tokens):
            scored.append(self._scored(part))
            ln_p = part.top_TK[:, :k].astype(np.float32)
            kept.append((part.ids_TK[:, :k].astype(narrow), ln_p.astype(np.float16), rest_of(ln_p)))
        likeliest = Likeliest(*(np.concatenate(some) for some in zip(*kept, strict=True)))
        return _joined(blocks, scored), likeliest

    def diverge(
        self, blocks: Blocks, base: Likeliest, on_tokens: OnTokens
    ) -> tuple[TokenScores, Divergence]:
        """The same, and how far it is from the base, as far as as many likeliest tokens tell."""
        scored, apart, first = [], [], 0
        k = max(base.ids_TK.shape[1], self.entropy_top_k)
        for part in self.told(blocks, k, on_tokens):
            scored.append(self._scored(part))
            here = base[first : first + len(part.logp_T)]
            first += len(part.logp_T)
            logp_TK = _of(here.ids_TK.astype(np.int64), part, self.vocab_size)
            same = logp_TK[:, 0] >= part.top_TK[:, 0]  # ids of equal ones are chance
            apart.append((kl_of_told(here, logp_TK, part.top_TK[:, -1]), same))
        divergence = Divergence(*(np.concatenate(some) for some in zip(*apart, strict=True)))
        return _joined(blocks, scored), divergence

    def _scored(self, part: Told) -> Scored:
        return part.logp_T, _entropy(part.top_TK[:, : self.entropy_top_k])


def _of(ids_TK: np.ndarray[tuple[int, int], np.dtype[np.int64]], part: Told, vocab: int) -> Floats:
    """ln p of the tokens asked for; NaN where they are not among those told."""
    row_T = vocab * np.arange(len(ids_TK))[:, None]
    known, asked = (row_T + part.ids_TK).ravel(), row_T + ids_TK
    order = np.argsort(known)
    at = order[np.searchsorted(known, asked, sorter=order).clip(max=len(known) - 1)]
    return np.where(known[at] == asked, part.top_TK.ravel()[at], np.nan)


def _joined(blocks: Blocks, parts: Sequence[Scored]) -> TokenScores:
    logp_T, entropy_T = (np.concatenate(some) for some in zip(*parts, strict=True))
    block_T = np.nonzero(blocks.scored_BS)[0].astype(np.int32)
    return TokenScores(logp_T.astype(np.float32), entropy_T.astype(np.float32), block_T)


def _entropy(top_TK: Floats) -> Floats:
    """Entropy of the K log-probs renormalised to 1, divided by ln K (as in head.py)."""
    log_q = top_TK - np.logaddexp.reduce(top_TK, axis=1, keepdims=True)
    entropy = -(np.exp(log_q) * log_q).sum(axis=1) / math.log(top_TK.shape[1])
    clipped: Floats = entropy.clip(0.0, 1.0)
    return clipped
