"""Scores, likeliest tokens and divergence of any model that tells all logits of a batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from eaft_prune.core.types import Blocks, Divergence, Likeliest, TokenScores, UserError
from eaft_prune.engines.base import OnTokens
from eaft_prune.maths.kl import kl_of_classes, rest_of


class TokenComparer(ABC):
    """Everything that a Comparer does with blocks, but for how logits are had."""

    @property
    @abstractmethod
    def vocab(self) -> int:
        """How many logits a position has."""

    @abstractmethod
    def batches(self, blocks: Blocks) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Per batch: ids [b, S], flat predictor positions of its scored tokens, their ids."""

    @abstractmethod
    def scores(
        self,
        ids: torch.Tensor,
        predictors: torch.Tensor,
        targets: torch.Tensor,
        kept: int = 1,
        asked: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """ln p and entropy of a batch's scored tokens, their likeliest, and of those asked for."""

    @torch.inference_mode()
    def score(self, blocks: Blocks, on_tokens: OnTokens) -> TokenScores:
        scored = []
        for ids, predictors, targets in self.batches(blocks):
            logp, entropy, *_ = self.scores(ids, predictors, targets)
            scored.append((logp.cpu(), entropy.cpu()))
            on_tokens(ids.numel())
        return token_scores_of(blocks, scored)

    @torch.inference_mode()
    def likeliest(
        self, blocks: Blocks, k: int, on_tokens: OnTokens
    ) -> tuple[TokenScores, Likeliest]:
        scored, kept = [], []
        narrow = np.uint16 if self.vocab <= 1 << 16 else np.int32
        for ids, predictors, targets in self.batches(blocks):
            logp, entropy, top, top_ids, _ = self.scores(
                ids, predictors, targets, min(k, self.vocab)
            )
            scored.append((logp.cpu(), entropy.cpu()))
            ln_p = top.cpu().numpy()
            kept.append(
                (top_ids.cpu().numpy().astype(narrow), ln_p.astype(np.float16), rest_of(ln_p))
            )
            on_tokens(ids.numel())
        scores = token_scores_of(blocks, scored)
        return scores, Likeliest(*(np.concatenate(part) for part in zip(*kept, strict=True)))

    @torch.inference_mode()
    def diverge(
        self, blocks: Blocks, base: Likeliest, on_tokens: OnTokens
    ) -> tuple[TokenScores, Divergence]:
        scored, apart, first = [], [], 0
        for ids, predictors, targets in self.batches(blocks):
            here = base[first : first + len(targets)]
            first += len(targets)
            asked = torch.from_numpy(here.ids_TK.astype(np.int64)).to(ids.device)
            logp, entropy, top, _, of_asked = self.scores(ids, predictors, targets, 1, asked)
            scored.append((logp.cpu(), entropy.cpu()))
            same = (of_asked[:, 0] >= top[:, 0]).cpu().numpy()  # ids of equal ones are chance
            apart.append((kl_of_classes(here, of_asked.cpu().numpy()), same))
            on_tokens(ids.numel())
        scores = token_scores_of(blocks, scored)
        return scores, Divergence(*(np.concatenate(part) for part in zip(*apart, strict=True)))


def token_scores_of(blocks: Blocks, scored: Sequence[tuple[torch.Tensor, ...]]) -> TokenScores:
    """The scores of batches, put together; raises UserError where one is no number."""
    block_T = np.nonzero(blocks.scored_BS)[0].astype(np.int32)
    logp, entropy = (torch.cat(part).numpy() for part in zip(*scored, strict=True))
    scores = TokenScores(logp, entropy, block_T)
    if not np.isfinite(scores.logp_T).all():
        raise UserError(
            f"pack {blocks.pack}: the model gives NaN probabilities; its weights are damaged, or "
            "runtime.dtype is too narrow for it"
        )
    return scores
