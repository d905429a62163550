"""evaluate: one model's token scores through the store, and all that they depend on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eaft_prune.checkpoints.model import Model, with_top_k
from eaft_prune.core.step import Step
from eaft_prune.core.store import Stored
from eaft_prune.core.types import Blocks, EvalKey, Evaluation, KeepPlan, TokenScores
from eaft_prune.pipeline.requests import evaluating
from eaft_prune.pipeline.session import Session
from eaft_prune.stages import evaluate
from eaft_prune.stages.pack import BlockRequest


@dataclass(frozen=True)
class Side:
    """One model of a comparison, as it is to be measured."""

    label: str
    model: Model
    mask: KeepPlan | None = None
    replicate: int = 0  # equal measurements with other numbers are made anew


@dataclass(frozen=True)
class Order:
    """Blocks in another order, and its name in keys."""

    name: str
    order_B: NDArray[np.int64]


@dataclass(frozen=True)
class ScorerConditions:
    """What a scorer said of itself when it last scored a checkpoint."""

    values: Mapping[str, Any]


def key_of(session: Session, side: Side) -> tuple[dict[str, Any], dict[str, str]]:
    """Settings and inputs of a side's evaluation, but for the blocks: known before any is loaded.

    With experts outside a mask it is the profiling engine that scores.
    """
    kind = session.kind if side.mask is None else session.profiling_kind
    settings = {**kind.key(session.options), "replicate": side.replicate}
    if session.experiment.eval.top_logprobs:
        settings["top_logprobs"] = True
    kept = side.mask.digest if side.mask and not side.mask.keeps_all else ""
    return settings, {"model": side.model.digest, "mask": kept}


def evaluated(
    session: Session,
    side: Side,
    blocks: Stored[Blocks],
    name: str,
    chunk: tuple[int, int] | None = None,
    order: Order | None = None,
) -> Step[TokenScores]:
    """The evaluation of a side on all blocks, or on those from chunk[0] to before chunk[1].

    order: the one that a chunk counts in; None: as they are.
    """
    settings, inputs = key_of(session, side)
    if chunk is not None:
        settings["chunk"] = list(chunk)
    if order is not None:
        settings["order"] = order.name
    first, end = chunk or (0, None)
    some = (blocks.value if order is None else blocks.value[order.order_B])[first:end]

    def compute() -> TokenScores:
        with session.bars.bar(name, some.ids_BS.size, "tok") as on_tokens:
            if side.mask is None:
                return evaluate.evaluate(session.scorer(side.model), some, on_tokens)
            profiler = session.profiler(side.model)
            return evaluate.evaluate_masked(profiler, some, side.mask, on_tokens)

    def facts(value: TokenScores, seconds: float) -> Mapping[str, Any]:
        tokens = some.ids_BS.size
        return {"tokens": tokens, "scored_tokens": len(value), "tokens_per_s": tokens / seconds}

    inputs = {**inputs, "blocks": blocks.digest}
    return Step(f"evaluate/{name}", evaluate.VERSION, settings, inputs, TokenScores, compute, facts)


def measure(
    session: Session, base: Model, side: Side, asked: Sequence[BlockRequest] | None = None
) -> Evaluation:
    """One model on every asked pack and length, by default all of the settings."""
    scores: dict[EvalKey, TokenScores] = {}
    rows: dict[EvalKey, NDArray[np.int32]] = {}
    token_digests: dict[EvalKey, str] = {}
    for request in evaluating(session.experiment) if asked is None else asked:
        blocks = session.blocks(base, request)
        name = f"{side.label}/{request.pack}/{request.seq_len}"
        stored = session.run(evaluated(session, side, blocks, name))
        scores[request.pack, request.seq_len] = stored.value
        rows[request.pack, request.seq_len] = blocks.value.conversation_BS[blocks.value.scored_BS]
        token_digests[request.pack, request.seq_len] = blocks.digest
    plan_digest = side.mask.digest if side.mask else None
    return Evaluation(
        side.label, side.model.digest, plan_digest, scores, rows, token_digests,
        conditions(session, side.model),
    )  # fmt: skip


def conditions(session: Session, model: Model) -> dict[str, Any]:
    """What both sides of a comparison must have in common."""
    kind, options = session.kind, session.options
    known = kind.conditions(options, model.top_k)
    if known is not None:
        return known
    if not kind.lasting(options):
        return dict(session.scorer(model).conditions)
    step = Step(
        f"server/{model.label}",
        1,
        kind.key(options),
        {"model": model.digest},
        ScorerConditions,
        lambda: ScorerConditions(session.scorer(model).conditions),
    )
    return dict(session.run(step).value.values)


def masked_model(session: Session, base: Model) -> tuple[Model, str]:
    """The model that plans are masked in, and the candidate's label, which names `eval.top_k`."""
    top_k = session.experiment.eval.top_k
    return (base, "masked") if top_k is None else (with_top_k(base, top_k), f"masked_top{top_k}")
