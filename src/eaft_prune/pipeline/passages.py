"""passages: what a candidate lost most on, of every pack at the longest length, for reports."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from eaft_prune.checkpoints.model import Model
from eaft_prune.core.digests import array_digest
from eaft_prune.core.passages import Passage, Passages
from eaft_prune.core.step import Step
from eaft_prune.core.store import Stored
from eaft_prune.core.types import UNION, Blocks, Evaluation, TokenScores
from eaft_prune.pipeline.requests import evaluating
from eaft_prune.pipeline.session import Session
from eaft_prune.stages import passages as stage


def differing(
    session: Session, model: Model, base: Evaluation, other: Evaluation
) -> Sequence[Passage]:
    """UNION's alone where no pack was evaluated by itself; none of interim analyses."""
    experiment = session.experiment
    if experiment.eval.early_stop:
        return []
    longest = max(experiment.eval.seq_lens)
    asked = [request for request in evaluating(experiment) if request.seq_len == longest]
    alone = [request for request in asked if request.pack != UNION] or asked
    found: list[Passage] = []
    for request in alone:
        key, blocks = (request.pack, request.seq_len), session.blocks(model, request)
        scores = base.scores[key], other.scores[key]
        step = Step(
            f"passages/{other.model}/{request.pack}",
            stage.VERSION,
            {},
            {
                "blocks": blocks.digest,
                "tokenizer": model.tokenizer_digest,
                "base": array_digest(scores[0].logp_T),
                "candidate": array_digest(scores[1].logp_T),
            },
            Passages,
            partial(_found, session, model, blocks, scores),
        )
        found += session.run(step).value.value
    return found


def _found(
    session: Session,
    model: Model,
    blocks: Stored[Blocks],
    scores: tuple[TokenScores, TokenScores],
) -> Passages:
    return stage.passages(blocks.value, *scores, session.tokenizer(model).inner.decode)
