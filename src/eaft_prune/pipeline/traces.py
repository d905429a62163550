"""The routing trace of the profiling blocks: all of them, or as many as the plan needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np

from eaft_prune.checkpoints.model import Model
from eaft_prune.core.step import Step
from eaft_prune.core.store import Stored
from eaft_prune.core.types import Blocks, KeepPlan, TokenScores, Trace
from eaft_prune.maths.agreement import jaccard
from eaft_prune.pipeline.requests import profiling
from eaft_prune.pipeline.session import Session
from eaft_prune.stages import profile
from eaft_prune.stages.plan import plan
from eaft_prune.stages.score import score


def trace_of(session: Session, base: Model) -> Stored[Trace]:
    """The routing trace that `profile` asks for."""
    settings = session.experiment.profile
    if settings.early_stop:
        return _converged(session, base)
    return whole_trace(session, base, settings.seed)


def whole_trace(session: Session, base: Model, seed: int | None) -> Stored[Trace]:
    """The trace of all profiling blocks, drawn with this seed."""
    return _traced(session, base, _blocks(session, base, seed), None)


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
        weights_TLK=np.concatenate([part.weights_TLK for part in parts]),
        norms_TLK=np.concatenate([part.norms_TLK for part in parts]),
        scores=TokenScores.joined(list(numbered)),
        pack_T=np.concatenate([part.pack_T for part in parts]),
        row_T=np.concatenate([part.row_T for part in parts]),
    )


def _converged(session: Session, base: Model) -> Stored[Trace]:
    """Blocks traced in doubling steps until a step leaves the keep plan as it was.

    How many steps are taken depends on the criterion, what a step yields does not: each is stored
    under its own key, and the trace they make under the digests of its steps.
    """
    settings, pruning = session.experiment.profile, session.experiment.pruning
    blocks = _blocks(session, base, settings.seed)
    ends = doubling(settings.early_stop_first_blocks, len(blocks.value))
    parts: list[Stored[Trace]] = []
    plans: list[KeepPlan] = []
    for first, end in pairwise([0, *ends]):
        parts.append(_traced(session, base, blocks, (first, end)))
        trace = joined([part.value for part in parts], [0, *ends][: len(parts)])
        plans.append(plan(pruning, score(pruning, trace), groups=base.groups))
        if len(plans) > 1 and jaccard(*plans[-2:]).mean() >= settings.early_stop_agreement:
            break
    agreement = [round(float(jaccard(*pair).mean()), 4) for pair in pairwise(plans)]
    step = Step(
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
    return session.run(step)


def _blocks(session: Session, base: Model, seed: int | None) -> Stored[Blocks]:
    return session.blocks(base, profiling(session.experiment, seed))


def _traced(
    session: Session, base: Model, blocks: Stored[Blocks], chunk: tuple[int, int] | None
) -> Stored[Trace]:
    """The trace of all blocks, or of those from chunk[0] to before chunk[1]."""
    name, settings = "profile", session.profiling_kind.key(session.options)
    first, end = chunk or (0, len(blocks.value))
    if chunk:
        name, settings = f"profile/{first}-{end}", {**settings, "chunk": [first, end]}
    tokens = (end - first) * blocks.value.seq_len

    def compute() -> Trace:
        engine = session.profiler(base)
        with session.bars.bar(name, tokens, "tok") as on_tokens:
            return profile.profile(engine, blocks.value[first:end], on_tokens)

    step = Step(
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
    return session.run(step)
