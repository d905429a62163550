"""Conversations -> prompts, and prompts -> what one model writes after them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from eaft_prune.config import GenerationSettings
from eaft_prune.core.generation import (
    Decoding,
    GenerationReport,
    Pair,
    Prompts,
    Text,
    Written,
    joined,
)
from eaft_prune.core.types import UserError
from eaft_prune.core.verdict import Changes
from eaft_prune.engines.base import OnTokens, Writer
from eaft_prune.maths.generation import change, first_difference, flips, loops, ratio
from eaft_prune.packs.answer import is_right
from eaft_prune.packs.harmony import ASSISTANT_START
from eaft_prune.packs.tokenizer import TransformersTokenizer
from eaft_prune.packs.tools import Tools, declared
from eaft_prune.packs.turn import is_well_formed

PROMPTS_VERSION = 1
VERSION = 1
Values = NDArray[np.float64]
_OTHERS = ("user", "developer", "system", "tool")  # whose turn ends the assistant's


def prompts(
    settings: GenerationSettings,
    rows: Mapping[str, Sequence[str]],
    tokenizer: TransformersTokenizer,
    answers: Mapping[str, str] = {},
) -> Prompts:
    """The first conversations of each pack that begin an assistant's turn early enough.

    Each is cut behind `<|start|>assistant` of its last turn that begins within max_prompt_tokens;
    what another than the assistant wrote comes before. answers: by text, of its last turn. Raises
    UserError where a pack has too few.
    """
    found: list[tuple[int, list[int], str | None]] = []
    for pack, (name, texts) in enumerate(rows.items()):
        mine: dict[tuple[int, ...], str | None] = {}
        for text in texts:
            cuts = [text[:end] for end in _turns(text)]
            ids = tokenizer.encode(cuts) if cuts else []
            fitting = [i for i, some in enumerate(ids) if len(some) <= settings.max_prompt_tokens]
            if fitting:
                is_last = fitting[-1] == len(cuts) - 1
                mine.setdefault(tuple(ids[fitting[-1]]), answers.get(text) if is_last else None)
            if len(mine) == settings.prompts:
                break
        if len(mine) < settings.prompts:
            raise UserError(
                f"pack {name}: {len(mine)} conversations have an assistant's turn within "
                f"generation.max_prompt_tokens = {settings.max_prompt_tokens}, "
                f"generation.prompts = {settings.prompts}: lower that"
            )
        found += [(pack, list(ids), answer) for ids, answer in mine.items()]
    found.sort(key=lambda one: len(one[1]))  # of one length a batch has little padding
    ids_N, ends_P = joined([ids for _, ids, _ in found])
    pack_P = np.array([pack for pack, _, _ in found], np.int32)
    return Prompts(ids_N, ends_P, pack_P, tuple(rows), tuple(answer for _, _, answer in found))


def _turns(text: str) -> list[int]:
    """Where the assistant's turns begin: behind each of its headers after another's message."""
    places, before, at = [], "", text.find("<|start|>")
    while at >= 0:
        is_assistant = text.startswith(ASSISTANT_START, at)
        if is_assistant and before == "other":
            places.append(at + len(ASSISTANT_START))
        before = "assistant" if is_assistant else "other"
        at = text.find("<|start|>", at + 1)
    return places


def stops(tokenizer: TransformersTokenizer) -> tuple[tuple[int, ...], ...]:
    """What ends a turn: EOS, a call, a return, or the header of somebody else's message."""
    texts = ["<|return|>", "<|call|>", *(f"<|start|>{role}" for role in _OTHERS)]
    return ((tokenizer.eos,), *(tuple(ids) for ids in tokenizer.encode(texts)))


def generate(
    writer: Writer, some: Sequence[Sequence[int]], how: Decoding, first: int, on_tokens: OnTokens
) -> Written:
    """What the model writes after each prompt, of which the first is number `first`."""
    written, ended = writer.generate(some, how, first, on_tokens)
    ids, ends = joined(written)
    return Written(ids, ends, np.array(ended))


def compare(
    asked: Prompts,
    base: Mapping[str, Written],
    other: Mapping[str, Written],
    tokenizer: TransformersTokenizer,
    confidence: float | None,
) -> GenerationReport:
    """What a candidate wrote beside its base, by decoding; the first is greedy.

    A prompt counts once: what it gives under several decodings is averaged. Exact tests are of the
    greedy answers alone.
    """
    written = [tokenizer.inner.decode(prompt) for prompt in asked.lists]
    tools = [declared(prompt) for prompt in written]
    texts = [
        {name: _texts(w, tokenizer, asked.answers, tools) for name, w in side.items()}
        for side in (base, other)
    ]
    shares = [_shares(side) for side in texts]
    lengths = [
        np.mean([[len(ids) for ids in w.lists] for w in side.values()], axis=0)
        for side in (base, other)
    ]
    places = [
        [first_difference(*two) for two in zip(base[name].lists, other[name].lists, strict=True)]
        for name in base
    ]
    same_P = np.mean([[at is None for at in some] for some in places], axis=0)
    equal, sure = bool((same_P == 1).all()), 0.95 if confidence is None else confidence
    found = {
        f"d{name}": change(shares[0][name], shares[1][name], sure, equal=equal) for name in _RATES
    }
    found["length_ratio"] = ratio(lengths[0], lengths[1], sure)
    found["agreement"] = change(np.zeros(len(asked)), same_P, sure, equal=equal)
    known = [i for i, answer in enumerate(asked.answers) if answer is not None]
    right_P = [
        np.mean([[bool(t.right) for t in s] for s in x.values()], axis=0)[known] for x in texts
    ]
    answered = None
    if known:
        accuracy = change(right_P[0], right_P[1], sure, equal=equal)
        answered = Changes(len(known), {"dtask_accuracy": accuracy})
    apart = [at for some in places for at in some if at is not None]
    greedy = next(iter(base))
    return GenerationReport(
        base=_means(shares[0], right_P[0]),
        candidate=_means(shares[1], right_P[1]),
        changes=Changes(len(asked), found),
        flips={
            name: flips(*(np.array([getattr(t, _RATES[name]) for t in s[greedy]]) for s in texts))
            for name in _RATES
        },
        answered=answered,
        median_first_difference=float(np.median(apart)) if apart else None,
        pairs=[
            Pair(asked.packs[asked.pack_P[i]], name, prompt, b, c, at)
            for name, some in zip(base, places, strict=True)
            for i, (prompt, b, c, at) in enumerate(
                zip(written, texts[0][name], texts[1][name], some, strict=True)
            )
        ],
    )


_RATES = {"loop_rate": "loops", "ended_rate": "ended", "well_formed_rate": "well_formed"}


def _texts(
    written: Written,
    tokenizer: TransformersTokenizer,
    answers: Sequence[str | None],
    tools: Sequence[Tools],
) -> list[Text]:
    found = []
    rows = zip(written.lists, written.ended_P.tolist(), answers, tools, strict=True)
    for ids, ended, answer, known in rows:
        text = tokenizer.inner.decode(ids)
        bare = text.removesuffix(tokenizer.inner.eos_token) if ended else text
        formed = is_well_formed(text, ended, known) or is_well_formed(bare, ended, known)
        right = None if answer is None else is_right(text, answer)
        found.append(Text(text, ended, loops(ids), formed, right))
    return found


def _means(shares: Mapping[str, Values], right_P: Values) -> dict[str, float]:
    found = {name: float(share_P.mean()) for name, share_P in shares.items()}
    return {**found, "task_accuracy": float(right_P.mean())} if len(right_P) else found


def _shares(texts: Mapping[str, Sequence[Text]]) -> dict[str, Values]:
    """Of every prompt the share of decodings with each property, [P]."""
    return {
        name: np.mean([[getattr(t, what) for t in some] for some in texts.values()], axis=0)
        for name, what in _RATES.items()
    }
