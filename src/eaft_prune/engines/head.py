"""ln p of a token and the entropy of the likeliest, without holding the logits of all positions."""

from __future__ import annotations

import math
from typing import Protocol

import torch

# bytes of logits held at once: on a CPU they should stay near the cache
_CPU_BYTES = 256 << 20
_CUDA_BYTES = 2 << 30


class Head(Protocol):
    """Logits [T, V] of last hidden states [T, H]."""

    @property
    def vocab(self) -> int: ...

    def __call__(self, hidden_TH: torch.Tensor, /) -> torch.Tensor: ...


def token_scores(
    head: Head,
    hidden_TH: torch.Tensor,
    targets_T: torch.Tensor,
    top_k: int,
    kept: int = 1,
    asked_TK: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """ln softmax(head(hidden))[target] and normalised entropy of the top k, float32 [T] each; and
    of the `kept` likeliest themselves ln p, float32 [T, kept], and ids, int32 [T, kept]; and ln p
    of the tokens asked for, float32 [T, K], of which there may be none.
    """
    cuda = hidden_TH.device.type == "cuda"
    width = hidden_TH.element_size() if cuda else 4
    rows = max(1, _budget(hidden_TH.device) // (width * head.vocab))
    if asked_TK is None:
        asked_TK = targets_T.new_empty((len(targets_T), 0))
    scored = []
    for part, target, asked in zip(
        *(torch.split(x, rows) for x in (hidden_TH, targets_T, asked_TK)), strict=True
    ):
        logits = head(part)
        logp, lse, top, ids = (_scan if cuda else _dense)(logits, target, max(top_k, kept))
        likeliest = top[:, :kept] - lse[:, None], ids[:, :kept]
        of_asked = logits.gather(1, asked).float() - lse[:, None]
        scored.append((logp.clamp(max=0.0), top_entropy(top[:, :top_k]), *likeliest, of_asked))
    if not scored:  # no position of the batch is scored
        nothing = torch.zeros(0, device=hidden_TH.device)
        none_of_k = nothing.view(0, 1).expand(0, kept)
        none_asked = nothing.view(0, 1).expand(0, asked_TK.shape[1])
        return nothing, nothing, none_of_k, none_of_k.int(), none_asked
    return tuple(torch.cat(parts) for parts in zip(*scored, strict=True))


def top_entropy(top_TK: torch.Tensor) -> torch.Tensor:
    """Entropy of softmax over the given logits, divided by ln K; in [0, 1]."""
    log_q = torch.log_softmax(top_TK, dim=-1)
    entropy = -(log_q.exp() * log_q).sum(dim=-1) / math.log(top_TK.shape[-1])
    return entropy.clamp(0.0, 1.0)


def _dense(logits: torch.Tensor, target: torch.Tensor, top_k: int) -> tuple[torch.Tensor, ...]:
    logits = logits.float()
    # one pass; logsumexp takes half as long again on a CPU
    logp = -torch.nn.functional.cross_entropy(logits, target, reduction="none")
    top, ids = torch.topk(logits, top_k, dim=-1)
    return logp, logits.gather(1, target[:, None]).squeeze(1) - logp, top, ids.int()


def _scan(logits: torch.Tensor, target: torch.Tensor, top_k: int) -> tuple[torch.Tensor, ...]:
    from eaft_prune.engines.kernels.head import lse_and_top

    lse, top, ids = lse_and_top(logits, top_k)
    return logits.gather(1, target[:, None]).squeeze(1).float() - lse, lse, top, ids


def _budget(device: torch.device) -> int:
    if device.type == "cpu":
        return _CPU_BYTES
    return min(_CUDA_BYTES, torch.cuda.get_device_properties(device).total_memory // 20)
