"""ln p of a token and the entropy of the likeliest, without holding the logits of all positions."""

from __future__ import annotations

import math

import torch

# bytes of logits held at once: on a CPU they should stay near the cache
_CPU_BYTES = 256 << 20
_CUDA_BYTES = 2 << 30


def token_scores(
    head: torch.nn.Module, hidden_TH: torch.Tensor, targets_T: torch.Tensor, top_k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """ln softmax(head(hidden))[target] and normalised entropy of the top k; float32 [T] each."""
    vocab: int = head.weight.shape[0]  # type: ignore[assignment, union-attr, index]
    cuda = hidden_TH.device.type == "cuda"
    width = hidden_TH.element_size() if cuda else 4
    rows = max(1, _budget(hidden_TH.device) // (width * vocab))
    logp, entropy = [], []
    for part, target in zip(
        torch.split(hidden_TH, rows), torch.split(targets_T, rows), strict=True
    ):
        lse, top, chosen = (_scan if cuda else _dense)(head(part), target, top_k)
        logp.append(chosen - lse)
        entropy.append(top_entropy(top))
    if not logp:
        return hidden_TH.new_zeros(0), hidden_TH.new_zeros(0)
    return torch.cat(logp).clamp(max=0.0), torch.cat(entropy)


def top_entropy(top_TK: torch.Tensor) -> torch.Tensor:
    """Entropy of softmax over the given logits, divided by ln K; in [0, 1]."""
    log_q = torch.log_softmax(top_TK, dim=-1)
    entropy = -(log_q.exp() * log_q).sum(dim=-1) / math.log(top_TK.shape[-1])
    return entropy.clamp(0.0, 1.0)


def _dense(
    logits: torch.Tensor, target: torch.Tensor, top_k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logits = logits.float()
    chosen = logits.gather(1, target[:, None]).squeeze(1)
    return torch.logsumexp(logits, -1), torch.topk(logits, top_k, dim=-1).values, chosen


def _scan(
    logits: torch.Tensor, target: torch.Tensor, top_k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from eaft_prune.engines.kernels.head import lse_and_top

    lse, top, _ = lse_and_top(logits, top_k)
    return lse, top, logits.gather(1, target[:, None]).squeeze(1).float()


def _budget(device: torch.device) -> int:
    if device.type == "cpu":
        return _CPU_BYTES
    return min(_CUDA_BYTES, torch.cuda.get_device_properties(device).total_memory // 20)
