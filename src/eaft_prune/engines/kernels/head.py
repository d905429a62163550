"""log-sum-exp and the largest k of rows of logits, read once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_GROUP = 64  # the largest k of a row lie in the k groups with the largest maxima


@triton.jit
def _scan_kernel(logits, lse, maxima, vocab, n_groups, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    peak = float("-inf")
    total = tl.zeros((BLOCK,), tl.float32)
    per_block: tl.constexpr = BLOCK // GROUP
    for start in tl.range(0, vocab, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(logits + row * vocab + columns, mask=columns < vocab, other=float("-inf"))
        x = x.to(tl.float32)
        groups = start // GROUP + tl.arange(0, per_block)
        highest = tl.max(tl.reshape(x, (per_block, GROUP)), 1)
        tl.store(maxima + row * n_groups + groups, highest, mask=groups < n_groups)
        higher = tl.maximum(peak, tl.max(highest, 0))
        total = total * tl.exp(peak - higher) + tl.exp(x - higher)
        peak = higher
    tl.store(lse + row, peak + tl.log(tl.sum(total)))


@triton.jit
def _select_kernel(
    logits, maxima, values, ids, vocab, n_groups,
    K: tl.constexpr, TAKE: tl.constexpr, GROUPS: tl.constexpr,
    GROUP: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, GROUPS)
    best = tl.load(maxima + row * n_groups + lanes, mask=lanes < n_groups, other=float("-inf"))
    slots = tl.arange(0, SLOTS)
    member = tl.arange(0, GROUP)
    chosen = tl.zeros((SLOTS,), tl.int32)
    for k in tl.range(0, TAKE):
        at = tl.argmax(best, 0)
        chosen = tl.where(slots == k, at, chosen)
        best = tl.where(lanes == at, float("-inf"), best)
    columns = chosen[:, None] * GROUP + member[None, :]
    real = (slots < TAKE)[:, None] & (columns < vocab)
    x = tl.load(logits + row * vocab + columns, mask=real, other=float("-inf")).to(tl.float32)
    x = tl.reshape(x, (SLOTS * GROUP,))
    columns = tl.reshape(columns, (SLOTS * GROUP,))
    place = tl.arange(0, SLOTS * GROUP)
    for k in tl.range(0, K):
        at = tl.argmax(x, 0)
        here = place == at
        tl.store(values + row * K + k, tl.max(x, 0))
        tl.store(ids + row * K + k, tl.sum(tl.where(here, columns, 0)))
        x = tl.where(here, float("-inf"), x)


def lse_and_top(logits_TV: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ln sum exp [T], the k largest logits [T, k] in descending order, and their ids [T, k]."""
    rows, vocab = logits_TV.shape
    n_groups = triton.cdiv(vocab, _GROUP)
    device = logits_TV.device
    lse = torch.empty(rows, dtype=torch.float32, device=device)
    maxima = torch.empty(rows, n_groups, dtype=torch.float32, device=device)
    values = torch.empty(rows, k, dtype=torch.float32, device=device)
    ids = torch.empty(rows, k, dtype=torch.int32, device=device)
    block = min(4096, max(_GROUP, triton.next_power_of_2(vocab)))
    _scan_kernel[(rows,)](
        logits_TV, lse, maxima, vocab, n_groups, GROUP=_GROUP, BLOCK=block,
        num_warps=4,
    )  # fmt: skip
    _select_kernel[(rows,)](
        logits_TV, maxima, values, ids, vocab, n_groups, K=k, TAKE=min(k, n_groups),
        GROUPS=triton.next_power_of_2(n_groups), GROUP=_GROUP, SLOTS=triton.next_power_of_2(k),
        num_warps=4,
    )  # fmt: skip
    return lse, values, ids
