"""Losses measured by masking experts on calibration blocks, through the store."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from eaft_prune.core.store import Stored
from eaft_prune.core.types import UNION, Blocks, ExpertScores, LayerLosses, UserError
from eaft_prune.engines.base import Engine
from eaft_prune.pipeline.session import Bench, Model
from eaft_prune.pipeline.traces import numerics
from eaft_prune.stages import losses as marginal
from eaft_prune.stages.losses import OnTokens, Stop
from eaft_prune.stages.pack import BlockRequest
from eaft_prune.stages.plan import plan, sizes_to_measure

T = TypeVar("T")


def calibration_request(bench: Bench) -> BlockRequest:
    """The blocks that losses are measured on: UNION, of the profiling rows."""
    settings = bench.experiment.marginal
    return BlockRequest(UNION, "profile", settings.seq_len, settings.num_blocks, settings.seed)


def marginal_scores(bench: Bench, base: Model) -> Stored[ExpertScores]:
    """Scores of leave_one_out, or of greedy, which begins with it."""
    settings, pruning = bench.experiment.marginal, bench.experiment.pruning
    n_layers, n_experts, top_k = _shape(base)
    confidence = settings.early_stop_confidence
    stop = Stop(pruning.keep_n, confidence) if settings.early_stop else None
    alone = _measured(
        bench,
        base,
        "marginal/leave_one_out",
        {} if stop is None else {"stop": vars(stop)},
        {},
        ExpertScores,
        lambda engine, blocks, told: marginal.leave_one_out(engine, blocks, stop, told),
        1 + n_layers * n_experts,
    )
    if pruning.saliency == "leave_one_out":
        return alone
    rounds = n_experts - pruning.keep_n if settings.rounds is None else settings.rounds
    if rounds > n_experts - top_k:
        raise UserError(
            f"marginal.rounds = {rounds}: this model routes each token to {top_k} of {n_experts} "
            f"experts, so a layer can lose at most {n_experts - top_k}"
        )
    candidates = min(settings.candidates, n_experts)
    return _measured(
        bench,
        base,
        "marginal/greedy",
        {"rounds": rounds, "candidates": candidates},
        {"alone": alone.digest},
        ExpertScores,
        lambda engine, blocks, told: marginal.greedy(
            engine, blocks, alone.value, rounds, candidates, told
        ),
        max(rounds - 1, 0) * (1 + n_layers * candidates),
    )


def layer_losses(bench: Bench, base: Model, scores: Stored[ExpertScores]) -> Stored[LayerLosses]:
    """What it costs to cut each layer alone to every size that selection=marginal_loss allows."""
    pruning = bench.experiment.pruning
    n_layers, n_experts, _ = _shape(base)
    alone = {"selection": "uniform", "min_keep_n": None, "max_keep_n": None}
    plans = {
        size: plan(pruning.model_copy(update={**alone, "keep_n": size}), scores.value)
        for size in sizes_to_measure(pruning, n_experts)
    }
    return _measured(
        bench,
        base,
        "marginal/layers",
        {"plans": {str(size): cut.digest for size, cut in plans.items()}},
        {},
        LayerLosses,
        lambda engine, blocks, told: marginal.layer_losses(engine, blocks, plans, told),
        1 + n_layers * sum(size < n_experts for size in plans),
    )


def _measured(
    bench: Bench,
    base: Model,
    name: str,
    settings: Mapping[str, Any],
    inputs: Mapping[str, str],
    kind: type[T],
    measure: Callable[[Engine, Blocks, OnTokens], T],
    evaluations: int,
) -> Stored[T]:
    """A measurement through the store; its record says how many tokens went through the model."""
    blocks = bench.blocks(base, calibration_request(bench))
    total = evaluations * blocks.value.ids_BS.size
    spent = 0

    def compute() -> T:
        engine = bench.profiler(base)
        with bench.bars.bar(name, total, "tok") as advance:

            def on_tokens(done: int) -> None:
                nonlocal spent
                spent += done
                advance(done)

            return measure(engine, blocks.value, on_tokens)

    return bench.stage(
        name,
        marginal.VERSION,
        {**numerics(bench), "what": name, **settings},
        {"model": base.digest, "blocks": blocks.digest, **inputs},
        kind,
        compute,
        lambda value, seconds: {
            "tokens": spent,
            "tokens_at_most": total,
            "scored_tokens": blocks.value.scored_tokens,
            "tokens_per_s": spent / seconds,
        },
    )


def _shape(base: Model) -> tuple[int, int, int]:
    """Layers, experts a layer, experts a token."""
    family, config = base.family, base.files.config
    return family.n_layers(config), family.n_experts(config), family.top_k(config)
