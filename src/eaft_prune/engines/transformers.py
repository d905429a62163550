"""The transformers engine: the checkpoint's own model code, with our experts and attention."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from eaft_prune.checkpoints.families.base import Family
from eaft_prune.core.generation import Decoding
from eaft_prune.core.types import Blocks, KeepPlan, Trace, UserError
from eaft_prune.engines import experts as moe
from eaft_prune.engines.base import OnTokens
from eaft_prune.engines.comparing import TokenComparer, token_scores_of
from eaft_prune.engines.generation import generate
from eaft_prune.engines.head import Head, token_scores
from eaft_prune.engines.logits import OwnHead, PlainHead


@dataclass(frozen=True)
class _Routing:
    """Routing at predictor positions: layers of the batch in flight, and the batches before it."""

    predictors: list[torch.Tensor] = field(default_factory=list)  # of the batch in flight
    layers: list[tuple[torch.Tensor, ...]] = field(default_factory=list)
    leaving: list[tuple[torch.Tensor, ...]] = field(default_factory=list)  # on their way to the CPU
    batches: list[tuple[torch.Tensor, ...]] = field(default_factory=list)  # ids, weights, norms

    def record(self, ids: torch.Tensor, weights: torch.Tensor, norms: torch.Tensor) -> None:
        """Keep what a layer's experts were asked, at the predictors only; on the device."""
        home = self.predictors[0].device
        rows = self.predictors[0].to(ids.device)  # layers may lie on several GPUs
        kept = (ids[rows].to(torch.int16), weights[rows].float(), norms[rows].float())
        self.layers.append(tuple(part.to(home) for part in kept))

    def end_batch(self) -> None:
        """Move a whole batch to the CPU, [tokens, L, K] each, while the next one is computed."""
        self.arrive()
        parts = zip(*self.layers, strict=True)
        self.leaving.append(tuple(_leave(torch.stack(part, dim=1)) for part in parts))
        self.layers.clear()

    def arrive(self) -> None:
        """Wait for what is on its way, and take it out of the memory that copies go through."""
        for parts in self.leaving:
            if any(part.is_pinned() for part in parts):
                torch.cuda.synchronize()
                parts = tuple(part.clone() for part in parts)
            self.batches.append(parts)
        self.leaving.clear()


def _leave(x: torch.Tensor) -> torch.Tensor:
    if x.device.type != "cuda":
        return x
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)


@dataclass(frozen=True)
class TransformersEngine(TokenComparer):
    """A model resident on one device."""

    model: Any
    family: Family
    device: torch.device
    dtype: str
    batch_tokens: int
    entropy_top_k: int
    top_k: int
    n_experts: int
    kernels: bool = False  # experts are transformers' own: nothing to observe

    @property
    def conditions(self) -> Mapping[str, Any]:
        return {
            "engine": "transformers-kernels" if self.kernels else "transformers",
            "dtype": self.dtype,
            "top_k": self.top_k,
            "entropy_top_k": self.entropy_top_k,
        }

    @property
    def vocab(self) -> int:
        return int(self.model.get_output_embeddings().weight.shape[0])

    def masked(self, plan: KeepPlan) -> AbstractContextManager[None]:
        return self.family.masked(self.model, plan)

    def generate(
        self, prompts: Sequence[Sequence[int]], how: Decoding, first: int, on_tokens: OnTokens
    ) -> tuple[list[list[int]], list[bool]]:
        return generate(self.model, prompts, how, first, on_tokens)

    @torch.inference_mode()
    def trace(self, blocks: Blocks, on_tokens: OnTokens) -> Trace:
        if self.kernels:
            raise UserError(
                "engine.experts = 'kernels' cannot be profiled: transformers' own experts do not "
                "tell their norms; profile with engine.experts=auto"
            )
        routing, scored = _Routing(), []
        with _recording(self.family.experts(self.model), routing):
            for ids, predictors, targets in self.batches(blocks):
                routing.predictors[:] = [predictors]
                logp, entropy, *_ = self.scores(ids, predictors, targets)
                scored.append((logp.cpu(), entropy.cpu()))
                routing.end_batch()
                on_tokens(ids.numel())
            routing.arrive()
        experts, weights, norms = (
            torch.cat(part).numpy() for part in zip(*routing.batches, strict=True)
        )
        row_T = blocks.row_BS[blocks.scored_BS]
        return Trace(
            experts_TLK=experts,
            weights_TLK=weights,
            norms_TLK=norms,
            scores=token_scores_of(blocks, scored),
            pack_T=blocks.row_packs[row_T],
            row_T=row_T,
            packs=blocks.packs,
            n_experts=self.n_experts,
        )

    def batches(self, blocks: Blocks) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Per batch: ids [b, S], flat predictor positions of its scored tokens, their ids."""
        size = max(1, self.batch_tokens // blocks.seq_len)
        for first in range(0, len(blocks), size):
            ids = torch.from_numpy(blocks.ids_BS[first : first + size]).long().to(self.device)
            scored = torch.from_numpy(blocks.scored_BS[first : first + size]).to(self.device)
            flat = scored.reshape(-1).nonzero().squeeze(1)
            yield ids, flat - 1, ids.reshape(-1)[flat]  # position 0 is never scored

    def scores(
        self,
        ids: torch.Tensor,
        predictors: torch.Tensor,
        targets: torch.Tensor,
        kept: int = 1,
        asked: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """ln p and entropy of a batch's scored tokens, their likeliest, and of those asked for."""
        hidden, head = self.body(ids)
        return token_scores(head, hidden[predictors], targets, self.entropy_top_k, kept, asked)

    def body(self, ids: torch.Tensor) -> tuple[torch.Tensor, Head]:
        """Last hidden states [b * S, H] of tokens [b, S], and what makes logits of them."""
        if self.device.type == "cuda" and self.dtype == "bfloat16" and self._is_gpt_oss:
            from eaft_prune.engines.gpt_oss_cuda import hidden_states

            return hidden_states(self.model, ids), PlainHead(self.model)
        out = self.model.base_model(input_ids=ids, use_cache=False)
        hidden = out.last_hidden_state
        return hidden.reshape(-1, hidden.shape[-1]), self.head_behind(out)

    def head_behind(self, body_output: Any) -> Head:
        """What makes logits of last hidden states, given what transformers' body put out."""
        return PlainHead(self.model) if self._is_gpt_oss else OwnHead(self.model, body_output)

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Of tokens [b, S] all logits, [b * S, V]."""
        hidden, head = self.body(ids)
        return head(hidden)

    @property
    def _is_gpt_oss(self) -> bool:
        return self.family.model_type == "gpt_oss" and not self.kernels


@contextmanager
def _recording(layers: list[torch.nn.Module], routing: _Routing) -> Iterator[None]:
    try:
        for module in layers:
            module.__dict__[moe.RECORDER] = routing.record
        yield
    finally:
        for module in layers:
            module.__dict__.pop(moe.RECORDER, None)
