"""evaluate: one model's token scores through the store, and all that they depend on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eaft_prune.checkpoints.model import Model, with_top_k
from eaft_prune.core.step import Step
from eaft_prune.core.store import Stored
from eaft_prune.core.types import Blocks, EvalKey, Evaluation, KeepPlan, TokenScores
from eaft_prune.engines.base import OnTokens
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


@dataclass(frozen=True)
class Part:
    """Some blocks in some order, as one evaluation."""

    where: str  # pack, length and whatever else tells it apart in records
    blocks: Stored[Blocks]
    chunk: tuple[int, int] | None = None  # from the first to before the second; None: all
    order: Order | None = None  # the one that a chunk counts in; None: as they are

    @property
    def some(self) -> Blocks:
        first, end = self.chunk or (0, None)
        whole = self.blocks.value
        return (whole if self.order is None else whole[self.order.order_B])[first:end]

    @property
    def settings(self) -> dict[str, Any]:
        """What keys hold of it beside the digest of all blocks."""
        found: dict[str, Any] = {} if self.chunk is None else {"chunk": list(self.chunk)}
        return found if self.order is None else {**found, "order": self.order.name}


def key_of(session: Session, side: Side) -> tuple[dict[str, Any], dict[str, str]]:
    """Settings and inputs of a side's evaluation, but for the blocks: known before any is loaded.

    With experts outside a mask it is the profiling engine that scores.
    """
    kind = session.kind if side.mask is None else session.profiling_kind
    settings = {**kind.key(session.options), "replicate": side.replicate}
    kept = side.mask.digest if side.mask and not side.mask.keeps_all else ""
    return settings, {"model": side.model.digest, "mask": kept}


def evaluated(
    session: Session, side: Side, part: Part, compute: Callable[[], TokenScores] | None = None
) -> Step[TokenScores]:
    """The evaluation of a side; compute: a pass that also gives more than scores."""
    settings, inputs = key_of(session, side)

    def plainly() -> TokenScores:
        with running(session, side, part) as (scorer, on_tokens):
            return evaluate.evaluate(scorer, part.some, on_tokens)

    def facts(value: TokenScores, seconds: float) -> Mapping[str, Any]:
        tokens = part.some.ids_BS.size
        return {"tokens": tokens, "scored_tokens": len(value), "tokens_per_s": tokens / seconds}

    name = f"evaluate/{side.label}/{part.where}"
    settings, inputs = {**settings, **part.settings}, {**inputs, "blocks": part.blocks.digest}
    made = plainly if compute is None else compute
    return Step(name, evaluate.VERSION, settings, inputs, TokenScores, made, facts)


def alone(session: Session, side: Side, part: Part) -> TokenScores:
    """A side's scores, compared with nothing."""
    return session.run(evaluated(session, side, part)).value


@contextmanager
def opened(session: Session, side: Side) -> Iterator[Any]:
    """The side's model, its experts masked inside."""
    if side.mask is None:
        yield session.scorer(side.model)
        return
    profiler = session.profiler(side.model)
    with profiler.masked(side.mask):
        yield profiler


@contextmanager
def running(session: Session, side: Side, part: Part) -> Iterator[tuple[Any, OnTokens]]:
    """The same, and a bar of the part's tokens."""
    total = part.some.ids_BS.size
    with (
        session.bars.bar(f"{side.label}/{part.where}", total, "tok") as on_tokens,
        opened(session, side) as scorer,
    ):
        yield scorer, on_tokens


def measure(
    session: Session,
    base: Model,
    side: Side,
    asked: Sequence[BlockRequest] | None = None,
    scored: Callable[[Side, Part], TokenScores] | None = None,
) -> Evaluation:
    """One model on every asked pack and length, by default all of the settings.

    scored: how its scores are had, if it is one of a comparison.
    """
    scored = scored or partial(alone, session)
    scores: dict[EvalKey, TokenScores] = {}
    rows: dict[EvalKey, NDArray[np.int32]] = {}
    token_digests: dict[EvalKey, str] = {}
    for request in evaluating(session.experiment) if asked is None else asked:
        blocks = session.blocks(base, request)
        key = request.pack, request.seq_len
        scores[key] = scored(side, Part(f"{request.pack}/{request.seq_len}", blocks))
        rows[key] = blocks.value.conversation_BS[blocks.value.scored_BS]
        token_digests[key] = blocks.digest
    plan_digest = side.mask.digest if side.mask else None
    compared = any(found.kl_T is not None for found in scores.values())
    return Evaluation(
        side.label, side.model.digest, plan_digest, scores, rows, token_digests,
        conditions(session, side.model), base.digest if compared else None,
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
