"""generate: what base and candidates write, through the store, a batch of prompts a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace

import numpy as np

from eaft_prune.checkpoints.model import Model
from eaft_prune.checkpoints.positions import max_positions
from eaft_prune.core.generation import Decoding, GenerationReport, Prompts, Written, joined
from eaft_prune.core.step import Step
from eaft_prune.core.store import Stored
from eaft_prune.core.types import UNION, UserError
from eaft_prune.pipeline.evaluation import Side, key_of, opened
from eaft_prune.pipeline.session import Session
from eaft_prune.stages import generate
from eaft_prune.stages.pack import BlockRequest, part_of


def generated(session: Session, base: Model, sides: Sequence[Side]) -> dict[str, GenerationReport]:
    """Every candidate beside the base, which is the first side; none without eval.generation."""
    experiment = session.experiment
    if not experiment.eval.generation:
        return {}
    prompts = prompts_of(session, base)
    tokenizer = session.tokenizer(base)
    decodings = _decodings(session, generate.stops(tokenizer))
    found = [_written(session, side, prompts, decodings) for side in sides]
    return {
        side.label: generate.compare(
            prompts.value, found[0], written, tokenizer, experiment.gate.confidence
        )
        for side, written in zip(sides[1:], found[1:], strict=True)
    }


def prompts_of(session: Session, base: Model) -> Stored[Prompts]:
    """What the models are to write on; raises UserError where packs or model have not the room."""
    if session.prompts is None:
        experiment = session.experiment
        packs = [name for name in experiment.eval_packs if name != UNION]
        names = packs or list(experiment.packs.files)
        session.prompts = session.run(_prompts(session, base, names))
        _check_length(session, base, session.prompts.value)
    return session.prompts


def _prompts(session: Session, base: Model, names: Sequence[str]) -> Step[Prompts]:
    """Conversations of the evaluation's rows, cut before a turn of the assistant."""
    experiment, files = session.experiment, session.pack_files()
    packs, asked = experiment.packs, experiment.generation

    def compute() -> Prompts:
        rows: dict[str, list[str]] = {}
        answers: dict[str, str] = {}
        for name in names:
            request = BlockRequest(name, "eval", 1, "all", experiment.eval.seed, "")
            texts = session.rows(base, name)
            rows[name] = part_of(packs, request, name, texts)
            known = zip(texts, session.answers(name), strict=False)  # which may be none at all
            answers |= {text: answer for text, answer in known if answer is not None}
        return generate.prompts(asked, rows, session.tokenizer(base), answers)

    settings = {
        "packs": {name: files[name][1] for name in names},
        "order": list(names),
        "text_column": packs.text_column,
        "split": packs.split,
        "profile_fraction": packs.profile_fraction,
        "seed": experiment.eval.seed,
        "prompts": asked.prompts,
        "max_prompt_tokens": asked.max_prompt_tokens,
    }
    return Step(
        "prompts",
        generate.PROMPTS_VERSION,
        settings,
        {"tokenizer": base.tokenizer_digest},
        Prompts,
        compute,
        lambda value, seconds: {"prompts": len(value), "tokens": len(value.ids_N)},
    )


def _decodings(session: Session, stops: tuple[tuple[int, ...], ...]) -> dict[str, Decoding]:
    asked = session.experiment.generation
    greedy = Decoding(asked.max_new_tokens, stops)
    drawn = {
        f"seed {seed}": replace(greedy, seed=seed, temperature=asked.temperature)
        for seed in asked.seeds
    }
    return {"greedy": greedy, **drawn}


def _written(
    session: Session, side: Side, prompts: Stored[Prompts], decodings: Mapping[str, Decoding]
) -> dict[str, Written]:
    """By decoding; a killed run goes on with the batch that it was writing."""
    size, total = session.experiment.generation.batch, len(prompts.value)
    found = {}
    for name, how in decodings.items():
        parts = [
            session.run(
                _batch(session, side, prompts, (name, how), first, min(first + size, total))
            )
            for first in range(0, total, size)
        ]
        lists = [ids for part in parts for ids in part.value.lists]
        ended = np.concatenate([part.value.ended_P for part in parts])
        found[name] = Written(*joined(lists), ended)
    return found


def _batch(
    session: Session,
    side: Side,
    prompts: Stored[Prompts],
    decoding: tuple[str, Decoding],
    first: int,
    end: int,
) -> Step[Written]:
    name, how = decoding
    settings, inputs = key_of(session, side)
    where = f"{side.label}/{name}/{first}-{end}"

    def compute() -> Written:
        some = prompts.value.lists[first:end]
        total = len(some) * how.max_new_tokens
        with (
            session.bars.bar(f"write {where} of {len(prompts.value)}", total, "tok") as on_tokens,
            opened(session, side) as writer,
        ):
            return generate.generate(writer, some, how, first, on_tokens)

    return Step(
        f"generate/{where}",
        generate.VERSION,
        {**settings, **asdict(how), "prompts": [first, end]},
        {**inputs, "prompts": prompts.digest},
        Written,
        compute,
        lambda value, seconds: {
            "tokens": len(value.ids_N),
            "tokens_per_s": len(value.ids_N) / seconds,
            "ended": int(value.ended_P.sum()),
        },
    )


def _check_length(session: Session, base: Model, prompts: Prompts) -> None:
    most = max_positions(base.language)
    asked = session.experiment.generation
    longest = max(map(len, prompts.lists))
    if most is not None and longest + asked.max_new_tokens > most:
        raise UserError(
            f"generation.max_new_tokens = {asked.max_new_tokens}: behind a prompt of {longest} "
            f"tokens the model has place for {most - longest}: lower it, or "
            "generation.max_prompt_tokens"
        )
