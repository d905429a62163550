"""The routing trace of the profiling blocks: all of them, or as many as the plan needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np

from eaft_prune.core.store import Stored
from eaft_prune.core.types import UNION, Blocks, KeepPlan, TokenScores, Trace
from eaft_prune.maths.agreement import jaccard
from eaft_prune.pipeline.session import Bench, Model
from eaft_prune.stages import profile
from eaft_prune.stages.pack import BlockRequest
from eaft_prune.stages.plan import plan
from eaft_prune.stages.score import score


def numerics(bench: Bench) -> dict[str, Any]:
    """What transformers' numbers depend on besides weights and tokens."""
    # packed and dequantised experts are the same weights; transformers' kernels round otherwise
    suffix = "-kernels" if bench.experiment.engine.experts == "kernels" else ""
    return {
        "engine": "transformers" + suffix,
        "dtype": bench.dtype(),
        "entropy_top_k": bench.experiment.eval.entropy_top_k,
    }


def trace_of(bench: Bench, base: Model) -> Stored[Trace]:
    """The routing trace that `profile` asks for."""
    settings = bench.experiment.profile
    if settings.early_stop:
        return _converged(bench, base)
    return whole_trace(bench, base, settings.seed)


def whole_trace(bench: Bench, base: Model, seed: int | None) -> Stored[Trace]:
    """The trace of all profiling blocks, drawn with this seed."""
    return _traced(bench, base, _blocks(bench, base, seed), None)


def doubling(first: int, total: int) -> list[int]:
    """Blocks profiled at each interim plan: first, twice that, ..., total."""
    counts = [min(first, total)]
    while counts[-1] < total:
        counts.append(min(2 * counts[-1], total))
    return counts


def joined(parts: Sequence[Trace], first_blocks: Sequence[int]) -> Trace:
    """Traces of successive blocks as one; first_blocks: where each begins."""
    numbered = zip(first_blocks, [part.scores for part in parts], strict=True)
    return replace(
        parts[0],
        experts_TLK=np.concatenate([part.experts_TLK for part in parts]),
        gates_TLK=np.concatenate([part.gates_TLK for part in parts]),
        norms_TLK=np.concatenate([part.norms_TLK for part in parts]),
        scores=TokenScores.joined(list(numbered)),
        pack_T=np.concatenate([part.pack_T for part in parts]),
        row_T=np.concatenate([part.row_T for part in parts]),
    )


def _converged(bench: Bench, base: Model) -> Stored[Trace]:
    """Blocks traced in doubling steps until a step leaves the keep plan as it was.

    How many steps are taken depends on the criterion, what a step yields does not: each is stored
    under its own key, and the trace they make under the digests of its steps.
    """
    settings, pruning = bench.experiment.profile, bench.experiment.pruning
    blocks = _blocks(bench, base, settings.seed)
    ends = doubling(settings.early_stop_first_blocks, settings.num_blocks)
    parts: list[Stored[Trace]] = []
    plans: list[KeepPlan] = []
    for first, end in pairwise([0, *ends]):
        parts.append(_traced(bench, base, blocks, (first, end)))
        trace = joined([part.value for part in parts], [0, *ends][: len(parts)])
        plans.append(plan(pruning, score(pruning, trace)))
        if len(plans) > 1 and jaccard(*plans[-2:]).mean() >= settings.early_stop_agreement:
            break
    agreement = [round(float(jaccard(*pair).mean()), 4) for pair in pairwise(plans)]
    return bench.stage(
        "profile/converged",
        profile.VERSION,
        {"ends": ends[: len(parts)]},
        {f"part{index}": part.digest for index, part in enumerate(parts)},
        Trace,
        lambda: trace,
        lambda value, seconds: {
            "tokens": end * settings.seq_len,
            "tokens_at_most": ends[-1] * settings.seq_len,
            "scored_tokens": len(value),
            "agreement": agreement,
        },
    )


def _blocks(bench: Bench, base: Model, seed: int | None) -> Stored[Blocks]:
    settings = bench.experiment.profile
    request = BlockRequest(UNION, "profile", settings.seq_len, settings.num_blocks, seed)
    return bench.blocks(base, request)


def _traced(
    bench: Bench, base: Model, blocks: Stored[Blocks], chunk: tuple[int, int] | None
) -> Stored[Trace]:
    """The trace of all blocks, or of those from chunk[0] to before chunk[1]."""
    name, settings = "profile", numerics(bench)
    first, end = chunk or (0, bench.experiment.profile.num_blocks)
    if chunk:
        name, settings = f"profile/{first}-{end}", {**settings, "chunk": [first, end]}
    tokens = (end - first) * bench.experiment.profile.seq_len

    def compute() -> Trace:
        engine = bench.profiler(base)
        with bench.bars.bar(name, tokens, "tok") as on_tokens:
            return profile.profile(engine, blocks.value[first:end], on_tokens)

    return bench.stage(
        name,
        profile.VERSION,
        settings,
        {"model": base.digest, "blocks": blocks.digest},
        Trace,
        compute,
        lambda trace, seconds: {
            "tokens": tokens,
            "scored_tokens": len(trace),
            "tokens_per_s": tokens / seconds,
        },
    )
