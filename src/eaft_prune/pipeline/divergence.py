"""Base and candidate, token by token: what the base holds likeliest, and how far a candidate is.

Both come with scores out of one pass, and are outputs of their own in the store: `evaluate` is the
same with and without them. The base's likeliest tokens are large and read only where a candidate is
new, so no record and no lock names them: they stay as long as the evaluation that they were made
with. Of a candidate five bytes a token are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from eaft_prune.core.step import Step
from eaft_prune.core.types import Divergence, Likeliest, TokenScores
from eaft_prune.pipeline.evaluation import Part, Side, alone, evaluated, key_of, running
from eaft_prune.pipeline.session import Session
from eaft_prune.stages import evaluate


def paired(session: Session, base: Side) -> Callable[[Side, Part], TokenScores]:
    """How the sides of a comparison are scored: the base alone, any other against it.

    Plainly, where `eval.kl_top_k` is null or the engine cannot tell.
    """
    k = session.experiment.eval.kl_top_k
    if k is None or not session.kind.compares:
        return partial(alone, session)

    def scored(side: Side, part: Part) -> TokenScores:
        if side is base:
            return _of_base(session, side, part, k)
        return _against(session, base, side, part, k)

    return scored


def _of_base(session: Session, base: Side, part: Part, k: int) -> TokenScores:
    kept: list[Likeliest] = []

    def compute() -> TokenScores:
        scores, likeliest = _likeliest(session, base, part, k)
        kept.append(likeliest)
        return scores

    scores = session.run(evaluated(session, base, part, compute)).value
    if kept:
        session.store.run(_likeliest_step(session, base, part, k, kept.pop))
    return scores


def _against(session: Session, base: Side, side: Side, part: Part, k: int) -> TokenScores:
    kept: list[Divergence] = []
    of_base = _likeliest_step(session, base, part, k, lambda: _likeliest(session, base, part, k)[1])

    def compute() -> TokenScores:
        likeliest = session.store.run(of_base).value
        with running(session, side, part) as (scorer, on_tokens):
            scores, divergence = evaluate.diverge(scorer, part.some, likeliest, on_tokens)
        kept.append(divergence)
        return scores

    def divergence() -> Divergence:
        if not kept:  # the scores are of a run that compared with nothing
            compute()
        return kept.pop()

    scores = session.run(evaluated(session, side, part, compute)).value
    settings, inputs = key_of(session, side)
    step = Step(
        f"divergence/{side.label}/{part.where}",
        evaluate.DIVERGENCE_VERSION,
        {**settings, **part.settings},
        {**inputs, "blocks": part.blocks.digest, "base": of_base.key},
        Divergence,
        divergence,
    )
    found = session.run(step).value
    return replace(scores, kl_T=found.kl_T, same_top_T=found.same_top_T)


def _likeliest(session: Session, base: Side, part: Part, k: int) -> tuple[TokenScores, Likeliest]:
    with running(session, base, part) as (scorer, on_tokens):
        return evaluate.likeliest(scorer, part.some, k, on_tokens)


def _likeliest_step(
    session: Session, base: Side, part: Part, k: int, compute: Callable[[], Likeliest]
) -> Step[Likeliest]:
    return Step(
        f"likeliest/{base.label}/{part.where}",
        evaluate.LIKELIEST_VERSION,
        {"kl_top_k": k},
        {"evaluation": evaluated(session, base, part).key},
        Likeliest,
        compute,
        lambda value, seconds: {"bytes": sum(array.nbytes for array in vars(value).values())},
    )
