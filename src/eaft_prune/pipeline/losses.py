"""Losses measured by masking experts on calibration blocks, through the store."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from eaft_prune.checkpoints.model import Model
from eaft_prune.core.step import Step
from eaft_prune.core.store import Stored
from eaft_prune.core.types import Blocks, ExpertScores, LayerLosses, UserError
from eaft_prune.engines.base import OnTokens, Profiler
from eaft_prune.pipeline.requests import calibration
from eaft_prune.pipeline.session import Session
from eaft_prune.stages import losses
from eaft_prune.stages.plan import plan, sizes_to_measure

T = TypeVar("T")


@dataclass(frozen=True)
class _Measurement(Generic[T]):
    """What is measured, and how many forward passes over the blocks it takes at most."""

    name: str
    kind: type[T]
    measure: Callable[[Profiler, Blocks, OnTokens], T]
    passes: int
    settings: Mapping[str, Any]
    inputs: Mapping[str, str] = field(default_factory=dict)


def marginal_scores(session: Session, base: Model) -> Stored[ExpertScores]:
    """Scores of leave_one_out, or of greedy, which begins with it."""
    settings, pruning = session.experiment.marginal, session.experiment.pruning
    confidence = settings.early_stop_confidence
    stop = losses.Stop(pruning.keep_n, confidence) if settings.early_stop else None
    alone = _measured(
        session,
        base,
        _Measurement(
            "marginal/leave_one_out",
            ExpertScores,
            lambda profiler, blocks, done: losses.leave_one_out(profiler, blocks, stop, done),
            1 + base.n_layers * base.n_experts,
            {} if stop is None else {"stop": vars(stop)},
        ),
    )
    if pruning.saliency == "leave_one_out":
        return alone
    rounds = base.n_experts - pruning.keep_n if settings.rounds is None else settings.rounds
    if rounds > base.n_experts - base.top_k:
        raise UserError(
            f"marginal.rounds = {rounds}: this model routes each token to {base.top_k} of "
            f"{base.n_experts} experts, so a layer can lose at most {base.n_experts - base.top_k}"
        )
    candidates = min(settings.candidates, base.n_experts)
    return _measured(
        session,
        base,
        _Measurement(
            "marginal/greedy",
            ExpertScores,
            lambda profiler, blocks, done: losses.greedy(
                profiler, blocks, alone.value, rounds, candidates, done
            ),
            max(rounds - 1, 0) * (1 + base.n_layers * candidates),
            {"rounds": rounds, "candidates": candidates},
            {"alone": alone.digest},
        ),
    )


def layer_losses(
    session: Session, base: Model, scores: Stored[ExpertScores]
) -> Stored[LayerLosses]:
    """What it costs to cut each layer alone to every size that selection=marginal_loss allows."""
    pruning = session.experiment.pruning
    alone = {"selection": "uniform", "min_keep_n": None, "max_keep_n": None}
    plans = {
        size: plan(
            pruning.model_copy(update={**alone, "keep_n": size}), scores.value, None, base.groups
        )
        for size in sizes_to_measure(pruning, base.n_experts)
    }
    return _measured(
        session,
        base,
        _Measurement(
            "marginal/layers",
            LayerLosses,
            lambda profiler, blocks, done: losses.layer_losses(profiler, blocks, plans, done),
            1 + base.n_layers * sum(size < base.n_experts for size in plans),
            {"plans": {str(size): cut.digest for size, cut in plans.items()}},
        ),
    )


def _measured(session: Session, base: Model, what: _Measurement[T]) -> Stored[T]:
    """A measurement through the store; its record says how many tokens went through the model."""
    blocks = session.blocks(base, calibration(session.experiment))
    total = what.passes * blocks.value.ids_BS.size
    spent = 0

    def compute() -> T:
        profiler = session.profiler(base)
        with session.bars.bar(what.name, total, "tok") as advance:

            def on_tokens(done: int) -> None:
                nonlocal spent
                spent += done
                advance(done)

            return what.measure(profiler, blocks.value, on_tokens)

    step = Step(
        what.name,
        losses.VERSION,
        {
            **session.profiling_kind.key(session.options),
            "what": what.name,
            **what.settings,
        },
        {"model": base.digest, "blocks": blocks.digest, **what.inputs},
        what.kind,
        compute,
        lambda value, seconds: {
            "tokens": spent,
            "tokens_at_most": total,
            "scored_tokens": blocks.value.scored_tokens,
            "tokens_per_s": spent / seconds,
        },
    )
    return session.run(step)
