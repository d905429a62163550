"""One point of a search: settings -> plan -> masked evaluation in chunks, each plan only once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eaft_prune.bench import Bench, Model
from eaft_prune.config import GateSettings, PruningSettings, SearchSettings
from eaft_prune.metrics import pack_report
from eaft_prune.pipeline import numerics, trace_of
from eaft_prune.stages.evaluate import VERSION, evaluate
from eaft_prune.stages.gate import gate
from eaft_prune.stages.pack import BlockRequest
from eaft_prune.stages.plan import plan as cut_plan
from eaft_prune.stages.score import score
from eaft_prune.types import UNION, Blocks, KeepPlan, PackReport, TokenScores, Trace

_LEAST_BLOCKS = 4  # the spread of fewer says nothing


@dataclass(frozen=True)
class BlockLosses:
    """Per block the summed -ln p and the number of scored tokens."""

    nll_B: NDArray[np.float64]
    tokens_B: NDArray[np.int64]


@dataclass(frozen=True)
class Measured:
    """A plan's objectives and constraints on all blocks of the search."""

    values: Mapping[str, float]
    constraints: Mapping[str, float]  # gate check |value| - limit; <= 0 holds
    hopeless: bool  # the perplexity alone breaks the gate, as it does for all that lose more


@dataclass(frozen=True)
class Problem:
    """What every trial shares: the trace, the blocks of each replicate, the base's scores."""

    bench: Bench
    base: Model
    trace: Trace
    trace_digest: str
    blocks: tuple[tuple[str, Blocks], ...]  # digest and blocks of each replicate
    settings: SearchSettings
    _scores: dict[str, TokenScores] = field(default_factory=dict)  # of the base and the last plan
    _losses: dict[str, BlockLosses] = field(default_factory=dict)

    @property
    def chunks(self) -> list[tuple[int, int, int]]:
        """(replicate, first block, end block) in the order of evaluation."""
        step = self.settings.chunk_blocks
        return [
            (replicate, first, min(first + step, self.settings.num_blocks))
            for replicate in range(len(self.blocks))
            for first in range(0, self.settings.num_blocks, step)
        ]


def open_problem(bench: Bench, settings: SearchSettings) -> Problem:
    """Profile once, cut the replicates' blocks from the profiling rows, score the base on them."""
    base = bench.base()
    trace = trace_of(bench, base)
    blocks = []
    for seed in settings.seeds:
        stored = bench.blocks(
            base, BlockRequest(UNION, "profile", settings.seq_len, settings.num_blocks, seed)
        )
        blocks.append((stored.digest, stored.value))
    problem = Problem(bench, base, trace.value, trace.digest, tuple(blocks), settings)
    total = settings.num_blocks * settings.seq_len * len(blocks)
    with bench.bars.bar("search: base", total, "tok") as on_tokens:
        for chunk in problem.chunks:
            chunk_scores(problem, None, chunk)
            on_tokens((chunk[2] - chunk[1]) * settings.seq_len)
    return problem


def plan_of(problem: Problem, pruning: PruningSettings) -> KeepPlan:
    """The keep plan of these settings, from the trace: no model."""
    return cut_plan(pruning, score(pruning, problem.trace))


def chunk_scores(
    problem: Problem, plan: KeepPlan | None, chunk: tuple[int, int, int]
) -> TokenScores:
    """Token scores of one chunk of blocks; from memory or the store where any process made them."""
    replicate, first, end = chunk
    mask = _mask(plan)
    name = f"{mask}/{replicate}/{first}"
    if name not in problem._scores:
        for other in list(problem._scores):  # token scores of all plans would fill the memory
            if not other.startswith(("/", f"{mask}/")):
                del problem._scores[other]
        digest, blocks = problem.blocks[replicate]
        bench = problem.bench
        part = replace(
            blocks,
            ids_BS=blocks.ids_BS[first:end],
            scored_BS=blocks.scored_BS[first:end],
            row_BS=blocks.row_BS[first:end],
        )
        stored = bench.store.run(
            "evaluate",
            VERSION,
            {**numerics(bench), "replicate": 0, "chunk": [first, end]},
            {"model": problem.base.digest, "blocks": digest, "mask": mask},
            TokenScores,
            lambda: evaluate(
                bench.engine(problem.base), part, plan if mask else None, lambda done: None
            ),
        )
        problem._scores[name] = stored.value
    return problem._scores[name]


def losses(problem: Problem, plan: KeepPlan | None, chunk: tuple[int, int, int]) -> BlockLosses:
    """Per-block losses of one chunk."""
    name = f"{_mask(plan)}/{chunk[0]}/{chunk[1]}"
    if name not in problem._losses:
        scores = chunk_scores(problem, plan, chunk)
        size = chunk[2] - chunk[1]
        nll = np.bincount(scores.block_T, -scores.logp_T.astype(np.float64), minlength=size)
        tokens = np.bincount(scores.block_T, minlength=size)
        problem._losses[name] = BlockLosses(nll.astype(np.float64), tokens)
    return problem._losses[name]


def running_dnll(problem: Problem, plan: KeepPlan) -> Iterator[float]:
    """dNLL against the base over the chunks so far, one value a chunk."""
    change = tokens = 0.0
    for chunk in problem.chunks:
        mine, base = losses(problem, plan, chunk), losses(problem, None, chunk)
        change += float(np.sum(mine.nll_B - base.nll_B))
        tokens += float(np.sum(base.tokens_B))
        yield change / tokens


def behind(
    problem: Problem, plan: KeepPlan, best: KeepPlan, chunks_done: int, confidence: float
) -> bool:
    """Whether the plan's loss is above the best's with this confidence, on the blocks so far.

    The blocks are the same for both, so their losses are compared in pairs: d = sum of differences
    / tokens, with the ratio estimator's standard error over blocks (Cochran, Sampling Techniques,
    1977, section 6.4) and a one-sided Student interval; never on fewer than 4 blocks.
    """
    pairs = [
        (losses(problem, plan, chunk), losses(problem, best, chunk))
        for chunk in problem.chunks[:chunks_done]
    ]
    change_B = np.concatenate([mine.nll_B - theirs.nll_B for mine, theirs in pairs])
    tokens_B = np.concatenate([mine.tokens_B for mine, _ in pairs])
    return above_zero(change_B, tokens_B, confidence)


def above_zero(
    change_B: NDArray[np.float64], tokens_B: NDArray[np.int64], confidence: float
) -> bool:
    """Whether sum(change) / sum(tokens) exceeds 0 with this one-sided confidence over blocks."""
    n = len(change_B)
    if n < _LEAST_BLOCKS:
        return False
    mean = change_B.sum() / tokens_B.sum()
    spread = change_B - mean * tokens_B
    error = np.sqrt(np.sum(spread**2) * n / (n - 1)) / tokens_B.sum()
    return bool(mean > student_quantile(confidence, n - 1) * error)


def student_quantile(probability: float, freedom: int) -> float:
    """Quantile of Student's t, to 2% from 3 degrees of freedom on (probability 0.5 to 0.99).

    Cornish-Fisher expansion in 1/freedom (Abramowitz and Stegun 26.7.5).
    """
    z, v = NormalDist().inv_cdf(probability), freedom
    return float(
        z
        + (z**3 + z) / (4 * v)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
        + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * v**4)
    )


def measured(
    problem: Problem, plan: KeepPlan, gate_settings: GateSettings, chunks_done: int | None = None
) -> Measured:
    """Objectives (absolute changes, mean over replicates) and gate constraints (worst replicate).

    A search scores fewer tokens than a gate asks for, so its JS2D is the bias-corrected one. With
    `chunks_done` on the first chunks only.
    """
    limits = gate_settings.model_copy(
        update={"pack": UNION, "packs": {}, "seq_lens": (problem.settings.seq_len,)}
    )
    chunks = problem.chunks[:chunks_done]
    values: list[dict[str, float]] = []
    constraints: list[dict[str, float]] = []
    margins: list[float] = []
    for replicate in sorted({chunk[0] for chunk in chunks}):
        base, mine = _reports(problem, plan, [c for c in chunks if c[0] == replicate])
        key = (UNION, problem.settings.seq_len)
        verdict = gate(limits, {key: base}, {key: mine})
        constraints.append({c.name: abs(c.value) - c.limit for c in verdict.checks})
        margins += [c.value - c.limit for c in verdict.checks if c.name == "dppl"]
        values.append(
            {check.name: abs(check.value) for check in verdict.checks}
            | {"dnll": float(np.log(mine.ppl) - np.log(base.ppl))}
        )
    mean = {name: float(np.mean([v[name] for v in values])) for name in values[0]}
    mean["keep_n"] = float(plan.uniform_keep_n or 0)
    worst = {name: max(c[name] for c in constraints) for name in constraints[0]}
    return Measured(mean, worst, bool(np.mean(margins) > 0))


def settings_of(pruning: PruningSettings, chosen: Mapping[str, Any]) -> PruningSettings:
    """The pruning settings with a trial's values in place, validated again."""
    changes = {name.removeprefix("pruning."): value for name, value in chosen.items()}
    return PruningSettings.model_validate({**pruning.model_dump(), **changes})


def _mask(plan: KeepPlan | None) -> str:
    return plan.digest if plan and not plan.keeps_all else ""


def _reports(
    problem: Problem, plan: KeepPlan, chunks: Sequence[tuple[int, int, int]]
) -> tuple[PackReport, PackReport]:
    quantile = problem.bench.experiment.eval.cc_quantile
    base, mine = (_joined(problem, mask, chunks) for mask in (None, plan))
    report = pack_report(mine, base, quantile)
    corrected = replace(report, js2d=max(report.js2d_corrected, 0.0))
    return pack_report(base, base, quantile), corrected


def _joined(
    problem: Problem, plan: KeepPlan | None, chunks: Sequence[tuple[int, int, int]]
) -> TokenScores:
    parts = [chunk_scores(problem, plan, chunk) for chunk in chunks]
    return TokenScores(
        np.concatenate([part.logp_T for part in parts]),
        np.concatenate([part.entropy_T for part in parts]),
        np.concatenate([p.block_T + c[1] for p, c in zip(parts, chunks, strict=True)]),
    )
