"""Calibration blocks -> what removing experts costs, measured by masking them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from eaft_prune.core.types import Blocks, ExpertScores, KeepPlan, LayerLosses, TokenScores
from eaft_prune.engines.base import Profiler
from eaft_prune.maths.elimination import interim_blocks, ratio_bounds, settled, tail_of

VERSION = 1

OnTokens = Callable[[int], None]


@dataclass(frozen=True)
class Stop:
    """Measure an expert no further once its place at a cut to keep_n is sure."""

    keep_n: int
    confidence: float


def leave_one_out(
    engine: Profiler, blocks: Blocks, stop: Stop | None, on_tokens: OnTokens
) -> ExpertScores:
    """S[l, j] = NLL without expert j of layer l - NLL of the whole model; higher = keep.

    NLL is the mean of -ln p over the scored tokens of the blocks, so S is in nats a token; below 0
    the expert does harm. Positive mass: the positive parts of the packs' shares in S.

    With `stop` there are interim analyses, and an expert ends once bounds say on which side of the
    cut it is; its score is then its estimate so far, within its bounds. If all bounds hold, the
    keep_n best of every layer are those of no stopping: another plan has at most the chance
    1 - confidence (see maths/elimination.py for what the bounds suppose).
    """
    ends = interim_blocks(len(blocks)) if stop else [len(blocks)]
    tokens_B = blocks.scored_BS.sum(axis=1)
    change_LEPB, count_LE = np.zeros(0), np.zeros(0, np.int64)
    for first, end in pairwise([0, *ends]):
        part = blocks[first:end]
        trace = engine.trace(part, on_tokens)
        whole_PB = _sums(part, trace.scores)
        if first == 0:
            shape = (trace.n_layers, trace.n_experts)
            change_LEPB = np.zeros((*shape, len(blocks.packs), len(blocks)))
            count_LE = np.zeros(shape, np.int64)
            seen_LE = np.zeros(shape, np.int64)
            low_LE, high_LE = np.full(shape, -np.inf), np.full(shape, np.inf)
            open_LE = np.ones(shape, bool)
        for layer, ids_TK in enumerate(trace.experts_TLK.transpose(1, 0, 2)):
            count_LE[layer] += np.bincount(ids_TK.reshape(-1), minlength=trace.n_experts)
        for layer, expert in np.argwhere(open_LE):
            kept_LE = np.ones(shape, bool)
            kept_LE[layer, expert] = False
            change_PB = _masked(engine, part, kept_LE, on_tokens) - whole_PB
            change_LEPB[layer, expert, :, first:end] = change_PB
        seen_LE[open_LE] = end
        if stop and end < len(blocks) and tokens_B[:end].any():
            tail = tail_of(stop.confidence, open_LE.size, len(blocks))
            change_LEB = change_LEPB[..., :end].sum(axis=2)
            low, high = ratio_bounds(change_LEB, tokens_B[:end], len(blocks), tail)
            low_LE[open_LE] = np.maximum(low_LE, low)[open_LE]
            high_LE[open_LE] = np.minimum(high_LE, high)[open_LE]
            open_LE = open_LE & ~settled(low_LE, high_LE, stop.keep_n)
    share_PLE = (change_LEPB.sum(axis=3) / np.cumsum(tokens_B)[seen_LE - 1][:, :, None]).transpose(
        2, 0, 1
    )
    score_LE = share_PLE.sum(axis=0)
    within_LE = np.where(seen_LE < len(blocks), np.clip(score_LE, low_LE, high_LE), score_LE)
    mass_PLE = np.maximum(share_PLE, 0.0)
    return ExpertScores(within_LE, mass_PLE.sum(axis=0), count_LE, {}, mass_PLE)


def greedy(
    engine: Profiler,
    blocks: Blocks,
    alone: ExpertScores,
    rounds: int,
    candidates: int,
    on_tokens: OnTokens,
) -> ExpertScores:
    """S[l, j] = in which order layer l loses its experts, 0 first; higher = keep.

    A round drops one expert of every layer: that of the lowest loss. Then the `candidates` lowest
    of those left are measured again, each masked beside all that have gone, and the next to go is
    one of them; the first goes by `alone`, the leave-one-out scores on these blocks, whose masses
    and counts stay. Experts that no round drops rank by the loss last measured. Of equal losses
    the higher id goes first, as in every ranking.
    """
    loss_LE = alone.score_LE.copy()
    n_layers, n_experts = loss_LE.shape
    kept_LE = np.ones(loss_LE.shape, bool)
    asked_LE = kept_LE.copy()
    gone: list[list[int]] = [[] for _ in range(n_layers)]
    for number in range(rounds):
        for layer in range(n_layers):
            gone[layer].append(_ascending(loss_LE[layer], asked_LE[layer])[0])
            kept_LE[layer, gone[layer]] = False
        if number == rounds - 1:
            break
        whole_PB = _masked(engine, blocks, kept_LE, on_tokens)
        asked_LE = np.zeros_like(kept_LE)
        for layer in range(n_layers):
            for expert in _ascending(loss_LE[layer], kept_LE[layer])[:candidates]:
                less_LE = kept_LE.copy()
                less_LE[layer, expert] = False
                change_PB = _masked(engine, blocks, less_LE, on_tokens) - whole_PB
                loss_LE[layer, expert] = change_PB.sum() / blocks.scored_tokens
                asked_LE[layer, expert] = True
    order_LE = np.zeros_like(loss_LE)
    for layer in range(n_layers):
        stay = _ascending(loss_LE[layer], kept_LE[layer])
        order_LE[layer, [*gone[layer], *stay]] = np.arange(n_experts)
    return replace(alone, score_LE=order_LE)


def layer_losses(
    engine: Profiler, blocks: Blocks, plans: Mapping[int, KeepPlan], on_tokens: OnTokens
) -> LayerLosses:
    """c[l, n] = NLL with layer l alone cut to n experts - NLL of the whole model; nats a token.

    plans[n] has the n experts that each layer keeps.
    """
    sizes = tuple(sorted(plans))
    n_layers, n_experts = len(plans[sizes[0]].kept), plans[sizes[0]].n_experts
    whole_PB = _sums(blocks, engine.score(blocks, on_tokens))
    loss_LN = np.zeros((n_layers, len(sizes)))
    for layer, column in np.ndindex(*loss_LN.shape):
        if sizes[column] == n_experts:
            continue
        kept_LE = np.ones((n_layers, n_experts), bool)
        kept_LE[layer] = np.isin(np.arange(n_experts), plans[sizes[column]].kept[layer])
        change_PB = _masked(engine, blocks, kept_LE, on_tokens) - whole_PB
        loss_LN[layer, column] = change_PB.sum() / blocks.scored_tokens
    return LayerLosses(sizes, loss_LN)


def _masked(
    engine: Profiler, blocks: Blocks, kept_LE: NDArray[np.bool_], on_tokens: OnTokens
) -> NDArray[np.float64]:
    kept = tuple(tuple(np.flatnonzero(kept_E).tolist()) for kept_E in kept_LE)
    with engine.masked(KeepPlan(kept, kept_LE.shape[1])):
        return _sums(blocks, engine.score(blocks, on_tokens))


def _sums(blocks: Blocks, scores: TokenScores) -> NDArray[np.float64]:
    """Summed -ln p [P, B] of every pack's tokens in every block."""
    pack_T = blocks.row_packs[blocks.row_BS[blocks.scored_BS]]
    cell_T = pack_T.astype(np.int64) * len(blocks) + scores.block_T
    size = len(blocks.packs) * len(blocks)
    sums = np.bincount(cell_T, -scores.logp_T.astype(np.float64), minlength=size)
    return sums.astype(np.float64).reshape(len(blocks.packs), len(blocks))


def _ascending(loss_E: NDArray[np.float64], among_E: NDArray[np.bool_]) -> list[int]:
    """Ids from the lowest loss up; of equal ones the higher id first."""
    ids = (int(i) for i in np.flatnonzero(among_E))
    return sorted(ids, key=lambda expert: (loss_E[expert], -expert))
