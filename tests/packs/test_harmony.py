"""Which tokens are scored, against a regular expression over the text."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support import tiny
from tokenizers import Tokenizer

from eaft_prune.core.types import UserError
from eaft_prune.packs.harmony import REQUIRED, Conversation, harmony_tokens, read_conversation

if TYPE_CHECKING:
    from eaft_prune.packs.tokenizer import TransformersTokenizer

# a message from its role to the first closing delimiter, the next message or the end of the row
ASSISTANT = re.compile(
    rb"<\|start\|>([^\s<]+)((?!<\|start\|>|<\|message\|>).)*<\|message\|>"
    rb"(.*?)(<\|end\|>|<\|call\|>|<\|return\|>|(?=<\|start\|>)|\Z)",
    re.DOTALL,
)
# whole messages, then perhaps one that is cut; of delimiters only those that bound messages count
_INNER = r"(?:(?!<\|(?:start|message|end|call|return)\|>).)*"
_BETWEEN = r"(?:\s|<\|(?:startoftext|endoftext|constrain|channel)\|>)*"
WELL_FORMED = re.compile(
    rf"{_BETWEEN}(?:<\|start\|>{_INNER}<\|message\|>{_INNER}<\|(?:end|call|return)\|>{_BETWEEN})*"
    rf"(?:<\|start\|>{_INNER}(?:<\|message\|>{_INNER})?)?",
    re.DOTALL,
)


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> TransformersTokenizer:
    from eaft_prune.packs.tokenizer import load_tokenizer

    return load_tokenizer(checkpoint)


@pytest.fixture(scope="module")
def pieces(checkpoint: Path) -> Callable[[str], list[tuple[int, int, int, bool]]]:
    """(id, first byte, end byte, is delimiter) of each token; the tokenizer is one byte a token."""
    inner = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    specials = {ident: token.content for ident, token in inner.get_added_tokens_decoder().items()}

    def cut(text: str) -> list[tuple[int, int, int, bool]]:
        at, out = 0, []
        for ident in inner.encode(text, add_special_tokens=False).ids:
            size = len(specials[ident]) if ident in specials else 1
            out.append((ident, at, at + size, ident in specials))
            at += size
        assert at == len(text.encode())
        return out

    return cut


def expected_mask(text: str, cut: Callable[[str], list[tuple[int, int, int, bool]]]) -> list[bool]:
    spans = [
        match.span(3) for match in ASSISTANT.finditer(text.encode()) if match[1] == b"assistant"
    ]
    return [
        not special and any(first <= start and end <= last for first, last in spans)
        for _, start, end, special in cut(text)
    ]


def read(tokenizer: TransformersTokenizer, text: str) -> Conversation:
    (ids,) = tokenizer.encode([text])
    return read_conversation(tokenizer.harmony, np.array(ids, np.int32))


def mask_of(tokenizer: TransformersTokenizer, text: str) -> list[bool]:
    mask: list[bool] = read(tokenizer, text).scored.tolist()
    return mask


def scored_text(tokenizer: TransformersTokenizer, text: str) -> str:
    (ids,) = tokenizer.encode([text])
    return str(
        tokenizer.inner.decode([i for i, s in zip(ids, mask_of(tokenizer, text), strict=True) if s])
    )


HEADERS = (
    "assistant",
    "assistant<|channel|>analysis",
    "assistant<|channel|>final",
    "assistant to=functions.f<|channel|>commentary <|constrain|>json",
    "assistant<|channel|>commentary to=functions.f <|constrain|>json",
    "assistant<|channel|>commentary to=assistant",
    "functions.f to=assistant<|channel|>commentary",
    "assistant_tool to=assistant",
    "user",
    "system",
    "developer",
    "tool assistant",
)
TEXT = st.lists(
    st.sampled_from(
        [
            "a", " b", "\n", "é", "語", "{", "assistant", "<|end", "|>", "<|", "<", "start|>",
            "user: assistant", "<|channel|>", "<|constrain|>", "<|start|>", "<|message|>",
            "<|start|>assistant<|message|>", "<|start|>user<|message|>", "<|startoftext|>",
        ]
    ),
    max_size=6,
).map("".join)  # fmt: skip
MESSAGE = st.builds(
    lambda header, text, end: f"<|start|>{header}<|message|>{text}{end}",
    st.sampled_from(HEADERS),
    TEXT,
    st.sampled_from(["<|end|>", "<|call|>", "<|return|>"]),
)
STRAY = st.sampled_from(
    [
        "",
        "",
        "",
        "noise",
        "<|end|>",
        "<|return|>",
        "<|message|>x<|end|>",
        "<|start|>",
        "<|channel|>",
    ]
)
ROW = st.lists(st.tuples(STRAY, MESSAGE).map("".join), max_size=5).map("".join)


@settings(max_examples=300)
@given(row=ROW, cut=st.integers(0, 60))
@example(row="<|start|>user<|message|>x<|end|><|start|>assistant<|message|>cut off here", cut=0)
@example(row="<|start|>assistant<|message|><|end|>", cut=0)
@example(row="", cut=0)
def test_the_mask_is_the_regular_expressions(
    tokenizer: TransformersTokenizer,
    pieces: Callable[[str], list[tuple[int, int, int, bool]]],
    row: str,
    cut: int,
) -> None:
    """On whole rows and on rows that end inside a message."""
    text = row[: len(row) - cut] if cut else row
    (ids,) = tokenizer.encode([text])
    assert [piece[0] for piece in pieces(text)] == ids
    assert mask_of(tokenizer, text) == expected_mask(text, pieces)
    assert (read(tokenizer, text).fault is None) == bool(WELL_FORMED.fullmatch(text))


CONVERSATION = (
    "<|start|>system<|message|>You are an assistant.<|end|>"
    "<|start|>developer<|message|># Tools<|end|>"
    "<|start|>user<|message|>say assistant: hi<|end|>"
    "<|start|>assistant<|channel|>analysis<|message|>think<|end|>"
    "<|start|>assistant to=functions.f<|channel|>commentary <|constrain|>json<|message|>"
    '{"a": 1}<|call|>'
    "<|start|>functions.f to=assistant<|channel|>commentary<|message|>result<|end|>"
    "<|start|>assistant<|channel|>commentary to=functions.g <|constrain|>json<|message|>"
    '{"b": 2}<|call|>'
    "<|start|>assistant<|channel|>final<|message|>done<|return|>"
)


def test_a_conversation_is_scored_where_the_assistant_wrote(
    tokenizer: TransformersTokenizer,
) -> None:
    assert scored_text(tokenizer, CONVERSATION) == 'think{"a": 1}{"b": 2}done'


@pytest.mark.parametrize(
    ("text", "scored"),
    [
        ("<|start|>user<|message|>assistant<|end|>", ""),
        ("<|start|>user<|message|><|start|>assistant<|message|>x<|end|>", "x"),
        ("<|start|>assistant<|message|>a<|start|>user<|message|>b<|end|>", "a"),
        ("<|start|>assistant<|message|>a", "a"),
        ("<|start|>assistant<|channel|>final", ""),
        ("assistant<|message|>a<|end|>", ""),
        ("<|start|>assistants<|message|>a<|end|>", ""),
        ("<|start|>tool to=assistant<|message|>a<|end|>", ""),
    ],
)
def test_what_only_looks_like_a_message(
    tokenizer: TransformersTokenizer, text: str, scored: str
) -> None:
    assert scored_text(tokenizer, text) == scored


def test_a_message_that_is_not_closed_scores_what_it_would_closed(
    tokenizer: TransformersTokenizer,
) -> None:
    """Of a conversation that lost every closing delimiter, as of the whole one."""
    lost = re.sub(r"<\|(end|call|return)\|>", "", CONVERSATION)
    assert scored_text(tokenizer, lost) == scored_text(tokenizer, CONVERSATION)
    assert read(tokenizer, CONVERSATION).fault is None
    assert read(tokenizer, lost).fault == "a message that is not closed before the next <|start|>"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", None),
        ("\n<|startoftext|>" + CONVERSATION + "<|endoftext|>\n", None),
        (CONVERSATION.removesuffix("done<|return|>"), None),
        (CONVERSATION + "<|start|>assistant<|chan", None),
        (CONVERSATION + "<|start|>assistant", None),
        ("some text", "outside a message"),
        (CONVERSATION + "more", "outside a message"),
        (CONVERSATION + "<|return|>", "outside a message"),
        ("assistant<|message|>x<|end|>", "outside a message"),
        ("<|start|>assistant<|end|>", "header without"),
        ("<|start|>assistant<|start|>assistant<|message|>a<|end|>", "header without"),
        ("<|start|>assistant<|message|>a<|channel|>final<|message|>b<|end|>", "inside a message"),
        # the delimiter that a message spoke of ended it
        ("<|start|>assistant<|message|>write <|end|> at the end<|end|>", "outside a message"),
    ],
)
def test_what_is_wrong_with_a_row(
    tokenizer: TransformersTokenizer, text: str, fault: str | None
) -> None:
    found = read(tokenizer, text).fault
    assert found is None if fault is None else found is not None and fault in found


def test_delimiters_are_never_scored(tokenizer: TransformersTokenizer) -> None:
    (ids,) = tokenizer.encode([CONVERSATION])
    mask = mask_of(tokenizer, CONVERSATION)
    delimiters = set(range(len(tiny.SPECIALS)))  # they are the tokenizer's first ids
    assert not delimiters & {i for i, scored in zip(ids, mask, strict=True) if scored}
    assert delimiters & set(ids)


@pytest.mark.parametrize("gone", REQUIRED)
def test_a_tokenizer_without_a_delimiter_is_named(tmp_path: Path, gone: str) -> None:
    from eaft_prune.packs.tokenizer import load_tokenizer

    tiny.write_tokenizer(tmp_path, [token for token in tiny.SPECIALS if token != gone])
    with pytest.raises(UserError, match=re.escape(gone)) as caught:
        load_tokenizer(tmp_path).harmony  # noqa: B018 - looking is what raises
    assert str(tmp_path) in str(caught.value)


def test_no_tokenizer_at_all_is_one_error(tmp_path: Path) -> None:
    from eaft_prune.packs.tokenizer import load_tokenizer

    with pytest.raises(UserError, match="tokenizer"):
        load_tokenizer(tmp_path)


def test_every_missing_delimiter_is_listed() -> None:
    with pytest.raises(UserError) as caught:
        harmony_tokens({"<|start|>": 0}, lambda ids: "", "here")
    listed: Any = [token for token in REQUIRED if token in str(caught.value)]
    assert listed == [token for token in REQUIRED if token != "<|start|>"]
