"""Sequential evaluation: chunks of blocks until the gate's verdict is sure (eval.early_stop)."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from eaft_prune.core.digests import digest
from eaft_prune.core.types import EvalKey, Evaluation, KeepPlan, TokenScores
from eaft_prune.pipeline.arrow import evaluation_key, measure, requests
from eaft_prune.pipeline.session import Bench, Model
from eaft_prune.records.evaluation import compare
from eaft_prune.stages.evaluate import evaluate
from eaft_prune.stages.pack import BlockRequest

log = logging.getLogger(__name__)

_FIRST_INTERIM = 30  # blocks: errors taken over fewer are too rough to stop on


@dataclass(frozen=True)
class Side:
    """One model of a comparison, as it is to be measured."""

    label: str
    model: Model
    mask: KeepPlan | None = None
    replicate: int = 0


def measure_all(bench: Bench, base: Model, sides: Sequence[Side]) -> list[Evaluation]:
    """Every side on every asked pack and length; the first is the base.

    With eval.early_stop what the gate reads is evaluated up to each interim analysis, on about
    twice as many blocks as the one before and at least 30, for all sides, until every candidate is
    PASS or FAIL. The chance of a wrong verdict is spent evenly over the n analyses (Bonferroni):
    each is judged with confidence 1 - alpha / n, and so is the last. Packs that the gate does not
    read come whole.
    """
    interim = bench.experiment.eval.interim_shares
    if len(interim) == 1:
        return [_whole(bench, base, side) for side in sides]
    read = [request for request in requests(bench) if _is_read(bench, request)]
    settings = bench.experiment.gate.over(len(interim))
    found: list[Evaluation] = []
    for number in range(1, len(interim) + 1):
        found = [_up_to(bench, base, side, read, interim[:number]) for side in sides]
        verdicts = compare(bench.experiment.eval, settings, found[0], found[1:]).verdicts
        told = ", ".join(f"{label} {verdict.status}" for label, verdict in verdicts.items())
        tokens = sum(map(len, found[0].scores.values()))
        log.info(
            "interim analysis %d of %d, %s scored tokens: %s",
            number,
            len(interim),
            f"{tokens:,}",
            told,
        )
        if all(verdict.status != "INCONCLUSIVE" for verdict in verdicts.values()):
            break
    others = [request for request in requests(bench) if request not in read]
    if not others:
        return found
    rest = [_whole(bench, base, side, others) for side in sides]
    return [
        replace(
            some,
            scores={**some.scores, **more.scores},
            token_digests={**some.token_digests, **more.token_digests},
        )
        for some, more in zip(found, rest, strict=True)
    ]


def _is_read(bench: Bench, request: BlockRequest) -> bool:
    settings = bench.experiment.gate
    packs = settings.limits(bench.experiment.eval_packs)
    return request.pack in packs and request.seq_len in settings.seq_lens


def _whole(
    bench: Bench, base: Model, side: Side, asked: Sequence[BlockRequest] | None = None
) -> Evaluation:
    return measure(bench, side.model, side.label, base, side.mask, side.replicate, asked)


def _up_to(
    bench: Bench,
    base: Model,
    side: Side,
    read: Sequence[BlockRequest],
    shares: Sequence[float],
) -> Evaluation:
    """One side on the first blocks of each request; a chunk a share, from the store if known."""
    scores: dict[EvalKey, TokenScores] = {}
    digests: dict[EvalKey, str] = {}
    for request in read:
        first_interim = min(_FIRST_INTERIM, request.num_blocks)
        ends = sorted({max(math.ceil(s * request.num_blocks), first_interim) for s in shares})
        parts = [
            (first, _chunk(bench, base, side, request, first, end))
            for first, end in zip([0, *ends], ends, strict=False)
        ]
        key = (request.pack, request.seq_len)
        scores[key] = TokenScores.joined(parts)
        digests[key] = digest([bench.blocks(base, request).digest, ends[-1]])
    whole = _whole(bench, base, side, [])
    return replace(whole, scores=scores, token_digests=digests)


def _chunk(
    bench: Bench, base: Model, side: Side, request: BlockRequest, first: int, end: int
) -> TokenScores:
    """Token scores of the blocks first..end, numbered from 0."""
    blocks = bench.blocks(base, request)
    part = blocks.value[first:end]
    name = f"evaluate/{side.label}/{request.pack}/{request.seq_len}/{first}-{end}"
    version, settings, inputs = evaluation_key(
        bench, side.model.digest, blocks.digest, side.mask, side.replicate
    )
    tokens = part.ids_BS.size

    def compute() -> TokenScores:
        engine = bench.engine(side.model)
        with bench.bars.bar(name, tokens, "tok") as on_tokens:
            return evaluate(engine, part, side.mask, on_tokens)

    stored = bench.stage(
        name,
        version,
        {**settings, "chunk": [first, end]},
        inputs,
        TokenScores,
        compute,
        lambda value, seconds: {"tokens": tokens, "scored_tokens": len(value)},
    )
    return stored.value
