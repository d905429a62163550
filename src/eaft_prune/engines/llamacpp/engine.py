"""The llama.cpp engine: all logits of a GGUF, so that it scores, compares and writes as ours do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from eaft_prune.core.generation import Decoding, ended_at
from eaft_prune.core.types import Blocks
from eaft_prune.engines.base import OnTokens
from eaft_prune.engines.comparing import TokenComparer
from eaft_prune.engines.generation import choose, noise_of
from eaft_prune.engines.head import token_scores
from eaft_prune.engines.llamacpp.process import Worker


class _Logits:
    """The head of a model whose last hidden states are its logits."""

    def __init__(self, vocab: int) -> None:
        self.vocab = vocab

    def __call__(self, hidden_TH: torch.Tensor) -> torch.Tensor:
        return hidden_TH


@dataclass(frozen=True)
class LlamaEngine(TokenComparer):
    """A GGUF held by a worker; a block after the other, a prompt after the other."""

    worker: Worker
    conditions: Mapping[str, Any]
    entropy_top_k: int

    @property
    def vocab(self) -> int:
        return self.worker.vocab

    def batches(self, blocks: Blocks) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        for ids_S, scored_S in zip(blocks.ids_BS, blocks.scored_BS, strict=True):
            at = torch.from_numpy(np.flatnonzero(scored_S))  # position 0 is never scored
            ids = torch.from_numpy(ids_S).long()
            yield ids[None], at - 1, ids[at]

    def scores(
        self,
        ids: torch.Tensor,
        predictors: torch.Tensor,
        targets: torch.Tensor,
        kept: int = 1,
        asked: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        want = predictors.tolist()
        logits = self.worker.logits(ids[0].tolist()[: max(want, default=-1) + 1], want)
        hidden = torch.from_numpy(logits.copy())
        return token_scores(_Logits(self.vocab), hidden, targets, self.entropy_top_k, kept, asked)

    def generate(
        self, prompts: Sequence[Sequence[int]], how: Decoding, first: int, on_tokens: OnTokens
    ) -> tuple[list[list[int]], list[bool]]:
        """What follows each prompt, and whether it ended by itself; prompt i is number first + i.

        Stops and noise are those of engine=transformers.
        """
        written, ended = [], []
        for number, prompt in enumerate(prompts, first):
            ids = self._write(list(prompt), how, number)
            end = ended_at(ids, how.stops)
            written.append(ids[:end])
            ended.append(end is not None)
            on_tokens(how.max_new_tokens)
        return written, ended

    def _write(self, prompt: list[int], how: Decoding, number: int) -> list[int]:
        noise = None if how.seed is None else noise_of(how.seed, number, 1, torch.device("cpu"))
        room, held, new = len(prompt) + how.max_new_tokens, 0, prompt
        written: list[int] = []
        while len(written) < how.max_new_tokens and ended_at(written, how.stops) is None:
            logits = self.worker.logits(new, [len(new) - 1], held, room)
            held += len(new)
            new = choose(torch.from_numpy(logits.copy()), how.temperature, noise).tolist()
            written += new
        return written
