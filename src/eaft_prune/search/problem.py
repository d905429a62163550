"""What every trial of a search shares: trace, blocks, and scores that are made only once."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from eaft_prune.checkpoints.model import Model
from eaft_prune.config import PruningSettings, SearchSettings
from eaft_prune.core.progress import Bars
from eaft_prune.core.store import Stored
from eaft_prune.core.types import Blocks, KeepPlan, TokenScores, Trace
from eaft_prune.pipeline.evaluation import Part, Side, evaluated
from eaft_prune.pipeline.requests import searching
from eaft_prune.pipeline.session import Session
from eaft_prune.pipeline.traces import trace_of
from eaft_prune.stages.plan import plan as cut_plan
from eaft_prune.stages.score import Masses, mass_key, masses, score_from


class Chunk(NamedTuple):
    """Blocks first..end-1 of one replicate: what is evaluated between two reports of a trial."""

    replicate: int
    first: int
    end: int


@dataclass(frozen=True)
class BlockLosses:
    """Per block the summed -ln p and the number of scored tokens."""

    nll_B: NDArray[np.float64]
    tokens_B: NDArray[np.int64]


@dataclass(frozen=True)
class Problem:
    """The base model, its trace, and the blocks of each replicate."""

    session: Session
    base: Model
    trace: Trace
    trace_digest: str
    blocks: tuple[Stored[Blocks], ...]  # of each replicate
    _scores: dict[str, TokenScores] = field(default_factory=dict)  # of the base and the last plan
    _losses: dict[str, BlockLosses] = field(default_factory=dict)
    _masses: dict[tuple[str | float, ...], Masses] = field(default_factory=dict)

    @property
    def settings(self) -> SearchSettings:
        settings = self.session.experiment.search
        assert settings is not None, "config requires search settings for task=search"
        return settings

    @property
    def chunks(self) -> list[Chunk]:
        """All chunks in the order of evaluation."""
        step = self.settings.chunk_blocks
        return [
            Chunk(replicate, first, min(first + step, len(blocks.value)))
            for replicate, blocks in enumerate(self.blocks)
            for first in range(0, len(blocks.value), step)
        ]


def open_problem(session: Session, base: Model) -> Problem:
    """Profile once, cut the replicates' blocks from the profiling rows, score the base on them."""
    settings = session.experiment.search
    assert settings is not None, "config requires search settings for task=search"
    trace = trace_of(session, base)
    blocks = tuple(session.blocks(base, request) for request in searching(session.experiment))
    for replicate, stored in enumerate(blocks):
        session.observer.needs(f"search.{replicate}", stored.digest)  # what trials are scored on
    problem = Problem(session, base, trace.value, trace.digest, blocks)
    total = sum(replicate.value.ids_BS.size for replicate in blocks)
    with session.bars.bar("search: base", total, "tok") as on_tokens:
        for chunk in problem.chunks:
            chunk_scores(problem, None, chunk)
            on_tokens((chunk.end - chunk.first) * settings.seq_len)
    return problem


def cut(problem: Problem, pruning: PruningSettings) -> KeepPlan:
    """The keep plan of these settings, from the trace: no model."""
    key = mass_key(pruning)
    if key not in problem._masses:
        problem._masses[key] = masses(pruning, problem.trace)
    return cut_plan(pruning, score_from(pruning, problem._masses[key]), None, problem.base.groups)


def chunk_scores(problem: Problem, plan: KeepPlan | None, chunk: Chunk) -> TokenScores:
    """Token scores of one chunk of blocks; from memory or the store where any process made them."""
    mask = _mask(plan)
    name = f"{mask}/{chunk.replicate}/{chunk.first}"
    if name not in problem._scores:
        for other in list(problem._scores):  # token scores of all plans would fill the memory
            if not other.startswith(("/", f"{mask}/")):
                del problem._scores[other]
        # many and small: no bar and no record of each
        session = replace(problem.session, bars=Bars(False))
        side = Side("search", problem.base, plan if mask else None)
        blocks = problem.blocks[chunk.replicate]
        step = evaluated(session, side, Part(name, blocks, (chunk.first, chunk.end)))
        problem._scores[name] = session.store.run(step).value
    return problem._scores[name]


def chunk_losses(problem: Problem, plan: KeepPlan | None, chunk: Chunk) -> BlockLosses:
    """Losses of one chunk, block by block."""
    name = f"{_mask(plan)}/{chunk.replicate}/{chunk.first}"
    if name not in problem._losses:
        scores = chunk_scores(problem, plan, chunk)
        size = chunk.end - chunk.first
        nll = np.bincount(scores.block_T, -scores.logp_T.astype(np.float64), minlength=size)
        tokens = np.bincount(scores.block_T, minlength=size)
        problem._losses[name] = BlockLosses(nll.astype(np.float64), tokens)
    return problem._losses[name]


def _mask(plan: KeepPlan | None) -> str:
    return plan.digest if plan and not plan.keeps_all else ""
