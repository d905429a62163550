"""What a search minimises, and what must hold, of a plan on the search's blocks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from eaft_prune.config import GateSettings
from eaft_prune.core.types import UNION, KeepPlan, TokenScores
from eaft_prune.core.verdict import PackReport
from eaft_prune.maths.metrics import pack_report
from eaft_prune.search.problem import Chunk, Problem, chunk_losses, chunk_scores
from eaft_prune.stages.gate import gate


@dataclass(frozen=True)
class Measured:
    """A plan's objectives and constraints on all blocks of the search."""

    values: Mapping[str, float]
    constraints: Mapping[str, float]  # gate check |value| - limit; <= 0 holds
    hopeless: bool  # the perplexity alone breaks the gate, as it does for all that lose more


def running_dnll(problem: Problem, plan: KeepPlan) -> Iterator[float]:
    """dNLL against the base over the chunks so far, one value a chunk."""
    change = tokens = 0.0
    for chunk in problem.chunks:
        mine, base = chunk_losses(problem, plan, chunk), chunk_losses(problem, None, chunk)
        change += float(np.sum(mine.nll_B - base.nll_B))
        tokens += float(np.sum(base.tokens_B))
        yield change / tokens


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
    for replicate in sorted({chunk.replicate for chunk in chunks}):
        base, mine = _reports(problem, plan, [c for c in chunks if c.replicate == replicate])
        key = (UNION, problem.settings.seq_len)
        verdict = gate(limits, {key: base}, {key: mine})
        constraints.append({c.name: abs(c.value) - c.limit for c in verdict.checks})
        margins += [c.value - c.limit for c in verdict.checks if c.name == "dppl"]
        values.append(
            {check.name: abs(check.value) for check in verdict.checks}
            | {"dnll": float(np.log(mine.ppl) - np.log(base.ppl))}
        )
    mean = {name: float(np.mean([v[name] for v in values])) for name in values[0]}
    mean["keep_n"] = plan.mean_keep_n
    worst = {name: max(c[name] for c in constraints) for name in constraints[0]}
    return Measured(mean, worst, bool(np.mean(margins) > 0))


def _reports(
    problem: Problem, plan: KeepPlan, chunks: Sequence[Chunk]
) -> tuple[PackReport, PackReport]:
    quantile = problem.session.experiment.eval.cc_quantile
    base, mine = (_joined(problem, mask, chunks) for mask in (None, plan))
    metrics = problem.session.experiment.gate.measured
    report = pack_report(mine, base, quantile, metrics)
    corrected = replace(report, js2d=max(report.js2d_corrected, 0.0))
    return pack_report(base, base, quantile, metrics), corrected


def _joined(problem: Problem, plan: KeepPlan | None, chunks: Sequence[Chunk]) -> TokenScores:
    return TokenScores.joined([(c.first, chunk_scores(problem, plan, c)) for c in chunks])
