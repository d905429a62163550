"""Sequential evaluation: chunks of blocks until the gate's verdict is sure (eval.early_stop)."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from eaft_prune.checkpoints.model import Model
from eaft_prune.core.digests import digest
from eaft_prune.core.types import EvalKey, Evaluation, TokenScores
from eaft_prune.pipeline.compare import compare
from eaft_prune.pipeline.divergence import paired
from eaft_prune.pipeline.evaluation import Order, Part, Side, measure
from eaft_prune.pipeline.requests import evaluating
from eaft_prune.pipeline.session import Session
from eaft_prune.stages.pack import BlockRequest

log = logging.getLogger(__name__)

_LEAST = 30  # blocks of an interim analysis: errors taken over fewer are too rough to stop on


def measure_all(
    session: Session,
    base: Model,
    sides: Sequence[Side],
    asked: Sequence[BlockRequest] | None = None,
) -> list[Evaluation]:
    """Every side on every asked pack and length, by default all of the settings; the first is the
    base.

    With eval.early_stop what the gate reads is evaluated in interim analyses, each about twice as
    many blocks as the one before and at least 30, for all sides, until every candidate is PASS or
    FAIL. Blocks come in an order drawn by eval.seed: the first of UNION are of all packs and the
    last of the longest alone, but an analysis must see a random part of what will be measured. The
    chance of a wrong verdict is spent evenly over the analyses (Bonferroni): each is judged with
    confidence 1 - alpha / analyses, and so is the last. Packs that the gate does not read come
    whole.
    """
    experiment = session.experiment
    shares = experiment.eval.interim_shares
    scored = paired(session, sides[0])
    asked = evaluating(experiment) if asked is None else asked
    if len(shares) == 1:
        return [measure(session, base, side, asked, scored) for side in sides]
    read = [request for request in asked if _is_read(session, request)]
    settings = experiment.gate.over(len(shares))
    found: list[Evaluation] = []
    for number in range(1, len(shares) + 1):
        so_far = shares[:number]
        found = [_up_to(session, base, side, scored, read, so_far) for side in sides]
        verdicts = compare(experiment.eval, settings, found[0], found[1:]).verdicts
        said = ", ".join(f"{label} {verdict.status}" for label, verdict in verdicts.items())
        tokens = sum(map(len, found[0].scores.values()))
        log.info(
            "interim analysis %d of %d, %s scored tokens: %s",
            number,
            len(shares),
            f"{tokens:,}",
            said,
        )
        if all(verdict.status != "INCONCLUSIVE" for verdict in verdicts.values()):
            break
    others = [request for request in asked if request not in read]
    if not others:
        return found
    rest = [measure(session, base, side, others, scored) for side in sides]
    return [
        replace(
            some,
            scores={**some.scores, **more.scores},
            rows={**some.rows, **more.rows},
            token_digests={**some.token_digests, **more.token_digests},
        )
        for some, more in zip(found, rest, strict=True)
    ]


def _is_read(session: Session, request: BlockRequest) -> bool:
    settings = session.experiment.gate
    packs = settings.limits(session.experiment.eval_packs)
    return request.pack in packs and request.seq_len in settings.seq_lens


def _up_to(
    session: Session,
    base: Model,
    side: Side,
    scored: Callable[[Side, Part], TokenScores],
    read: Sequence[BlockRequest],
    shares: Sequence[float],
) -> Evaluation:
    """One side on the first blocks of each request; a chunk a share, from the store if known."""
    seed = session.experiment.eval.seed
    assert seed is not None, "config requires eval.seed with eval.early_stop"
    scores: dict[EvalKey, TokenScores] = {}
    rows: dict[EvalKey, NDArray[np.int32]] = {}
    digests: dict[EvalKey, str] = {}
    for request in read:
        blocks = session.blocks(base, request)
        total = len(blocks.value)
        order = Order(f"random {seed}", np.random.default_rng(seed).permutation(total))
        ends = sorted({max(math.ceil(s * total), min(_LEAST, total)) for s in shares})
        where = f"{request.pack}/{request.seq_len}"
        parts = []
        for first, end in zip([0, *ends], ends, strict=False):
            part = Part(f"{where}/{first}-{end}", blocks, (first, end), order)
            parts.append((first, scored(side, part)))
        key = (request.pack, request.seq_len)
        scores[key] = TokenScores.joined(parts)
        seen = order.order_B[: ends[-1]]
        rows[key] = blocks.value.conversation_BS[seen][blocks.value.scored_BS[seen]]
        digests[key] = digest([blocks.digest, order.name, ends[-1]])
    none = measure(session, base, side, [])
    compared = any(found.kl_T is not None for found in scores.values())
    return replace(
        none,
        scores=scores,
        rows=rows,
        token_digests=digests,
        compared_with=base.digest if compared else None,
    )
