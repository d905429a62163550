"""Which turns are harmony: what the format says, and ways in which pruned models break it."""

from __future__ import annotations

import pytest

from eaft_prune.packs.turn import is_well_formed

FINAL = "<|channel|>final<|message|>Hello.<|return|>"
THOUGHT = "<|channel|>analysis<|message|>Let me see.<|end|><|start|>assistant"
CALL = (
    '<|channel|>commentary to=functions.find <|constrain|>json<|message|>{"where": [1, 2]}<|call|>'
)
GOOD = {
    "an answer": FINAL,
    "a thought and an answer": THOUGHT + FINAL,
    "two thoughts": THOUGHT * 2 + FINAL,
    "a call": CALL,
    "a call, recipient first": ' to=functions.find<|channel|>commentary<|message|>{"a": 1}<|call|>',
    "json without constrain": CALL.replace("<|constrain|>", ""),
    "a preamble and a call": "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant"
    + CALL,
    "handed over": "<|channel|>final<|message|>Hello.<|end|>",
    "empty": "<|channel|>final<|message|><|return|>",
}
BAD = {
    "no channel": "<|message|>Hello.<|return|>",
    "an unknown channel": FINAL.replace("final", "finale"),
    "no message": "<|channel|>final Hello.<|return|>",
    "channel inside": FINAL.replace("Hello", "Hel<|channel|>lo"),
    "message inside": FINAL.replace("Hello", "Hel<|message|>lo"),
    "not closed before the next": THOUGHT.replace("<|end|>", "") + FINAL,
    "a call that is not JSON": CALL.replace("]}", "]"),
    "a call of nobody": CALL.replace(" to=functions.find", ""),
    "text behind the end": FINAL.replace("<|return|>", "<|end|>!"),
    "text behind the return": FINAL + "!",
    "nothing": "",
    "ends inside": "<|channel|>final<|message|>Hello.",
}


@pytest.mark.parametrize("name", GOOD)
def test_well_formed(name: str) -> None:
    assert is_well_formed(GOOD[name], ended=True)


@pytest.mark.parametrize("name", BAD)
def test_malformed(name: str) -> None:
    assert not is_well_formed(BAD[name], ended=True)


PIECES = (
    "<|channel|>",
    "<|message|>",
    "<|end|>",
    "<|start|>",
    "<|call|>",
    "<|return|>",
    "<|constrain|>",
)


def tokens(text: str) -> list[str]:
    parts = [text]
    for piece in PIECES:
        parts = [q for p in parts for q in (_around(p, piece) if p not in PIECES else [p])]
    return [q for p in parts for q in ([p] if p in PIECES else list(p))]


def _around(text: str, piece: str) -> list[str]:
    out: list[str] = []
    for part in text.split(piece):
        out += [part, piece]
    return [part for part in out[:-1] if part]


@pytest.mark.parametrize("name", GOOD)
def test_the_limit_may_cut_it_anywhere(name: str) -> None:
    pieces = tokens(GOOD[name])
    assert "".join(pieces) == GOOD[name]
    for end in range(len(pieces)):
        assert is_well_formed("".join(pieces[:end]), ended=False), pieces[:end]


@pytest.mark.parametrize(
    "name",
    ["an unknown channel", "message inside", "not closed before the next", "a call of nobody"],
)
def test_what_is_broken_before_the_limit_stays_broken(name: str) -> None:
    assert not is_well_formed(BAD[name], ended=False)
