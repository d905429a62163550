"""Several processes, one model each: blocks are shared out, results put back in order.

Under `torchrun --nproc-per-node=N` rank 0 runs the experiment; the others only load models and
score what they are sent. Batches are dealt out whole, so every forward is the one that a single
process would have made, and results are equal to the last bit.
"""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

# its default arguments keep the group there is when it is first imported (transformers does), and
# the group's threads, still there when Python ends, sometimes abort it
import torch.distributed.nn.functional

from eaft_prune.core.generation import Decoding
from eaft_prune.core.types import (
    Blocks,
    Divergence,
    KeepPlan,
    Likeliest,
    TokenScores,
    Trace,
    UserError,
)
from eaft_prune.engines import lifeline
from eaft_prune.engines.base import OnTokens
from eaft_prune.engines.transformers import TransformersEngine
from eaft_prune.engines.world import RankLost

_GRACE = 5.0  # seconds
# ranks wait while rank 0 hashes, exports and writes; that one is gone is heard of beside (lifeline)
_PATIENCE = timedelta(days=30)

_wires: lifeline.Lifeline | None = None  # of rank 0, from the meeting to the end

Load = Callable[..., TransformersEngine]
Array = np.ndarray[Any, Any]


def join() -> None:
    """Meet the other processes, each on a GPU of its own where there are any."""
    if dist.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("gloo", timeout=_PATIENCE)
    global _wires
    if dist.get_rank() > 0:
        lifeline.hold()
    elif dist.get_world_size() > 1:
        _wires = lifeline.Lifeline()


def serve(load: Load) -> int:
    """Do what rank 0 asks until it is done; returns the exit code."""
    join()
    engine: TransformersEngine | None = None
    while True:
        order: list[Any] = [None]
        try:
            dist.broadcast_object_list(order, src=0)
        except RuntimeError:
            time.sleep(_GRACE)  # where rank 0 is gone, its lifeline says so and ends this process
            raise
        match order[0]:
            case ("stop",):
                dist.destroy_process_group()
                return 0
            case ("load", arguments):
                engine = None
                answer = _tried(load, *arguments)
                engine = answer if isinstance(answer, TransformersEngine) else None
                dist.gather_object(answer if engine is None else None, dst=0)
            case (str(what), shares, plan, parts):
                assert engine is not None, f"{what} was asked before a model was loaded"
                share, part = shares[dist.get_rank()], parts[dist.get_rank()]
                done = _tried(_run, engine, what, share, plan, _silent, part)
                failed = isinstance(done, _Failure)
                dist.gather_object(done if failed else None, dst=0)
                everybody: list[Any] = [None]
                dist.broadcast_object_list(everybody, src=0)
                if everybody[0] and share.scored_tokens:
                    for part in done:
                        dist.send(_bytes(part), dst=0)


@dataclass
class ParallelEngine:
    """An engine whose blocks are shared out over all processes; rank 0's part is `local`."""

    local: TransformersEngine
    _plan: KeepPlan | None = None  # of the mask that is on

    @property
    def conditions(self) -> Mapping[str, Any]:
        return self.local.conditions

    @contextmanager
    def masked(self, plan: KeepPlan) -> Iterator[None]:
        assert self._plan is None, "a mask is on already: the other processes know of one"
        self._plan = plan
        try:
            with self.local.masked(plan):
                yield
        finally:
            self._plan = None

    def score(self, blocks: Blocks, on_tokens: OnTokens) -> TokenScores:
        logp, entropy = self._all("score", blocks, on_tokens)
        return TokenScores(logp, entropy, _block_T(blocks))

    def likeliest(
        self, blocks: Blocks, k: int, on_tokens: OnTokens
    ) -> tuple[TokenScores, Likeliest]:
        logp, entropy, *top = self._all("likeliest", blocks, on_tokens, k)
        return TokenScores(logp, entropy, _block_T(blocks)), Likeliest(*top)

    def diverge(
        self, blocks: Blocks, base: Likeliest, on_tokens: OnTokens
    ) -> tuple[TokenScores, Divergence]:
        logp, entropy, *apart = self._all("diverge", blocks, on_tokens, base)
        return TokenScores(logp, entropy, _block_T(blocks)), Divergence(*apart)

    def generate(
        self, prompts: Sequence[Sequence[int]], how: Decoding, first: int, on_tokens: OnTokens
    ) -> tuple[list[list[int]], list[bool]]:
        return self.local.generate(prompts, how, first, on_tokens)  # the others wait

    def trace(self, blocks: Blocks, on_tokens: OnTokens) -> Trace:
        logp, entropy, experts, weights, norms = self._all("trace", blocks, on_tokens)
        row_T = blocks.row_BS[blocks.scored_BS]
        return Trace(
            experts_TLK=experts,
            weights_TLK=weights,
            norms_TLK=norms,
            scores=TokenScores(logp, entropy, _block_T(blocks)),
            pack_T=blocks.row_packs[row_T],
            row_T=row_T,
            packs=blocks.packs,
            n_experts=self.local.n_experts,
        )

    def _all(
        self, what: str, blocks: Blocks, on_tokens: OnTokens, more: int | Likeliest | None = None
    ) -> list[Array]:
        """Every rank's arrays, one after the other: ranks hold consecutive blocks."""
        with _together():
            return self._shared(what, blocks, on_tokens, more)

    def _shared(
        self, what: str, blocks: Blocks, on_tokens: OnTokens, more: int | Likeliest | None
    ) -> list[Array]:
        batch = max(1, self.local.batch_tokens // blocks.seq_len)
        shares = [blocks[part] for part in deal(len(blocks), batch, dist.get_world_size())]
        ends = np.cumsum([share.scored_tokens for share in shares])
        parts = [
            more[end - share.scored_tokens : end] if isinstance(more, Likeliest) else more
            for share, end in zip(shares, ends, strict=True)
        ]
        dist.broadcast_object_list([(what, shares, self._plan, parts)], src=0)
        # rank 0 is masked already
        mine = _tried(_run, self.local, what, shares[0], None, on_tokens, parts[0])
        _check(mine if isinstance(mine, _Failure) else None)
        whole = [np.empty((ends[-1], *part.shape[1:]), part.dtype) for part in mine]
        for part, into in zip(mine, whole, strict=True):
            into[: ends[0]] = part
        for rank in range(1, len(shares)):
            for into in whole:
                if shares[rank].scored_tokens:
                    dist.recv(_bytes(into[ends[rank - 1] : ends[rank]]), src=rank)
        on_tokens(blocks.ids_BS.size - shares[0].ids_BS.size)
        return whole


def load_everywhere(load: Load, *arguments: Any) -> ParallelEngine:
    """Load one model in every process."""
    join()
    with _together():
        dist.broadcast_object_list([("load", arguments)], src=0)
        local = _tried(load, *arguments)
        _gather(local if isinstance(local, _Failure) else None)
    return ParallelEngine(local)


def stop() -> None:
    """Let the other processes go."""
    join()  # they wait to be met, even where no model was ever loaded
    if _wires is None or _wires.intact:
        dist.broadcast_object_list([("stop",)], src=0)
    if _wires is not None:
        _wires.close()
    dist.destroy_process_group()


def _together() -> AbstractContextManager[None]:
    """Around work that needs all processes; raises RankLost once one is gone."""
    return nullcontext() if _wires is None else _wires.guarded()


def deal(blocks: int, batch: int, ranks: int) -> list[slice]:
    """The consecutive blocks of every rank, in whole batches as one process would cut them."""
    batches = -(-blocks // batch)
    ends = [min(blocks, -(-batches * rank // ranks) * batch) for rank in range(ranks + 1)]
    return [slice(first, end) for first, end in pairwise(ends)]


@dataclass(frozen=True)
class _Failure:
    rank: int
    text: str
    error: UserError | None  # what is the user's affair is said as it is


def _tried(run: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    try:
        return run(*arguments, **named)
    except RankLost:
        raise
    except UserError as error:
        return _Failure(dist.get_rank(), str(error), error)
    except Exception:
        return _Failure(dist.get_rank(), traceback.format_exc(), None)


def _gather(mine: _Failure | None) -> None:
    """Hear of every rank's failure; raises what the first that failed did."""
    parts: list[Any] = [None] * dist.get_world_size()
    dist.gather_object(mine, parts, dst=0)
    for part in parts:
        if part is not None:
            if part.error is not None:
                raise part.error
            raise RuntimeError(f"rank {part.rank} failed:\n{part.text}")


def _check(mine: _Failure | None) -> None:
    """The same, and tell the others whether to send what they have."""
    try:
        _gather(mine)
    except BaseException:
        dist.broadcast_object_list([False], src=0)
        raise
    dist.broadcast_object_list([True], src=0)


def _run(
    engine: TransformersEngine,
    what: str,
    blocks: Blocks,
    plan: KeepPlan | None,
    on: OnTokens,
    more: Any,
) -> list[Array]:
    """log p and H, what is said of likeliest tokens, and of a trace ids, router weights, norms."""
    if len(blocks) == 0:
        return []
    with engine.masked(plan) if plan is not None else nullcontext():
        if what == "score":
            scores = engine.score(blocks, on)
            return [scores.logp_T, scores.entropy_T]
        if what != "trace":
            scores, said = getattr(engine, what)(blocks, more, on)
            return [scores.logp_T, scores.entropy_T, *vars(said).values()]
        trace = engine.trace(blocks, on)
    scores = trace.scores
    return [
        scores.logp_T,
        scores.entropy_T,
        trace.experts_TLK,
        trace.weights_TLK,
        trace.norms_TLK,
    ]


def _block_T(blocks: Blocks) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.nonzero(blocks.scored_BS)[0].astype(np.int32)


def _bytes(array: Array) -> torch.Tensor:
    return torch.from_numpy(array.reshape(-1).view(np.uint8))


def _silent(done: int) -> None:
    pass
