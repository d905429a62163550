"""Several processes, one model each: blocks are shared out, results put back in order.

Under `torchrun --nproc-per-node=N` rank 0 runs the experiment; the others only load models and
score what they are sent. Batches are dealt out whole, so every forward is the one that a single
process would have made, and results are equal to the last bit.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from eaft_prune.engines.base import OnTokens
from eaft_prune.engines.transformers import TransformersEngine
from eaft_prune.types import Blocks, KeepPlan, TokenScores, Trace, UserError

# ranks wait while rank 0 hashes, exports and writes
_PATIENCE = timedelta(days=30)

Load = Callable[..., TransformersEngine]


def join() -> None:
    """Meet the other processes, each on a GPU of its own where there are any."""
    if dist.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("gloo", timeout=_PATIENCE)


def serve(load: Load) -> int:
    """Do what rank 0 asks until it is done; returns the exit code."""
    join()
    engine: TransformersEngine | None = None
    while True:
        order: list[Any] = [None]
        dist.broadcast_object_list(order, src=0)
        match order[0]:
            case ("stop",):
                dist.destroy_process_group()
                return 0
            case ("load", arguments):
                engine = None
                answer = _tried(load, **arguments)
                engine = answer if isinstance(answer, TransformersEngine) else None
                dist.gather_object(answer if engine is None else None, dst=0)
            case (str(what), shares, plan):
                assert engine is not None, f"{what} was asked before a model was loaded"
                share = shares[dist.get_rank()]
                done = _tried(_run, engine, what, share, plan, _silent)
                dist.gather_object(done, dst=0)


@dataclass
class ParallelEngine:
    """An engine whose blocks are shared out over all processes; rank 0's part is `local`."""

    local: TransformersEngine
    _plan: list[KeepPlan] = field(default_factory=list)  # of the mask that is on

    @property
    def conditions(self) -> Mapping[str, Any]:
        return self.local.conditions

    @contextmanager
    def masked(self, plan: KeepPlan) -> Iterator[None]:
        self._plan.append(plan)
        try:
            with self.local.masked(plan):
                yield
        finally:
            self._plan.pop()

    def score(self, blocks: Blocks, on_tokens: OnTokens) -> TokenScores:
        parts, order = self._all("score", blocks, on_tokens)
        return _merged_scores(parts, order)

    def trace(self, blocks: Blocks, on_tokens: OnTokens) -> Trace:
        parts, order = self._all("trace", blocks, on_tokens)
        rows = order.argsort
        first: Trace = parts[0]
        return replace(
            first,
            scores=_merged_scores([part.scores for part in parts], order),
            **{
                name: np.concatenate([getattr(part, name) for part in parts])[rows]
                for name in ("experts_TLK", "gates_TLK", "norms_TLK", "pack_T", "row_T")
            },
        )

    def _all(self, what: str, blocks: Blocks, on_tokens: OnTokens) -> tuple[list[Any], _Order]:
        """Every rank's result, and how their tokens go back into block order."""
        batch = max(1, self.local.batch_tokens // blocks.seq_len)
        chosen = deal(len(blocks), batch, dist.get_world_size())
        shares = [_some(blocks, indices) for indices in chosen]
        plan = self._plan[-1] if self._plan else None
        dist.broadcast_object_list([(what, shares, plan)], src=0)
        # rank 0 is masked already
        mine = _tried(_run, self.local, what, shares[0], None, on_tokens)
        parts = _gathered(mine)
        on_tokens(blocks.ids_BS.size - shares[0].ids_BS.size)
        per_block = blocks.scored_BS.sum(axis=1)
        block_T = np.concatenate([np.repeat(indices, per_block[indices]) for indices in chosen])
        used = [part for part, indices in zip(parts, chosen, strict=True) if len(indices)]
        return used, _Order(block_T.astype(np.int32), np.argsort(block_T, kind="stable"))


@dataclass(frozen=True)
class _Order:
    block_T: np.ndarray[Any, Any]  # block of every token, rank by rank
    argsort: np.ndarray[Any, Any]


def load_everywhere(load: Load, arguments: Mapping[str, Any]) -> ParallelEngine:
    """Load one model in every process."""
    join()
    dist.broadcast_object_list([("load", dict(arguments))], src=0)
    local = _tried(load, **arguments)
    _gathered(local if isinstance(local, _Failure) else None)
    return ParallelEngine(local)


def stop() -> None:
    """Let the other processes go."""
    join()  # they wait to be met, even where no model was ever loaded
    dist.broadcast_object_list([("stop",)], src=0)
    dist.destroy_process_group()


def deal(blocks: int, batch: int, ranks: int) -> list[np.ndarray[Any, Any]]:
    """Block indices of every rank: whole batches, dealt out in turn."""
    batches = [np.arange(i, min(i + batch, blocks)) for i in range(0, blocks, batch)]
    nothing = np.arange(0)
    return [np.concatenate([nothing, *batches[rank::ranks]]) for rank in range(ranks)]


@dataclass(frozen=True)
class _Failure:
    rank: int
    text: str
    error: UserError | None  # what is the user's affair is said as it is


def _tried(run: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    try:
        return run(*arguments, **named)
    except UserError as error:
        return _Failure(dist.get_rank(), str(error), error)
    except Exception:
        return _Failure(dist.get_rank(), traceback.format_exc(), None)


def _gathered(mine: Any) -> list[Any]:
    """Everybody's answer; raises what the first that failed did, with its traceback."""
    parts: list[Any] = [None] * dist.get_world_size()
    dist.gather_object(mine, parts, dst=0)
    for part in parts:
        if isinstance(part, _Failure):
            if part.error is not None:
                raise part.error
            raise RuntimeError(f"rank {part.rank} failed:\n{part.text}")
    return parts


def _run(
    engine: TransformersEngine, what: str, blocks: Blocks, plan: KeepPlan | None, told: OnTokens
) -> Any:
    if len(blocks) == 0:
        return None
    work = {"score": engine.score, "trace": engine.trace}[what]
    if plan is None:
        return work(blocks, told)
    with engine.masked(plan):
        return work(blocks, told)


def _merged_scores(parts: Sequence[TokenScores], order: _Order) -> TokenScores:
    logp = np.concatenate([part.logp_T for part in parts])[order.argsort]
    entropy = np.concatenate([part.entropy_T for part in parts])[order.argsort]
    return TokenScores(logp, entropy, order.block_T[order.argsort])


def _some(blocks: Blocks, indices: np.ndarray[Any, Any]) -> Blocks:
    return replace(
        blocks,
        ids_BS=blocks.ids_BS[indices],
        scored_BS=blocks.scored_BS[indices],
        row_BS=blocks.row_BS[indices],
    )


def _silent(done: int) -> None:
    pass
