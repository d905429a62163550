"""Which tokens of a harmony conversation an assistant wrote."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eaft_prune.core.types import UserError

REQUIRED = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>")
_CLOSING = ("<|end|>", "<|call|>", "<|return|>")
ASSISTANT_START = "<|start|>assistant"


@dataclass(frozen=True)
class HarmonyTokens:
    """Ids of the delimiters, and how header ids read as text."""

    start: int
    message: int
    closing: frozenset[int]
    special: NDArray[np.int64]
    decode: Callable[[Sequence[int]], str]


def harmony_tokens(
    special_ids: Mapping[str, int], decode: Callable[[Sequence[int]], str], source: str
) -> HarmonyTokens:
    """Look the delimiters up; raises UserError naming those the tokenizer does not have."""
    missing = [token for token in REQUIRED if token not in special_ids]
    if missing:
        raise UserError(
            f"{source}: the tokenizer has no harmony tokens {', '.join(missing)}: use a checkpoint "
            "whose tokenizer knows the format, let its chat template write the rows with "
            "packs.format=messages, or score whole rows with packs.format=plain"
        )
    return HarmonyTokens(
        start=special_ids["<|start|>"],
        message=special_ids["<|message|>"],
        closing=frozenset(special_ids[token] for token in _CLOSING),
        special=np.array(sorted(special_ids.values()), np.int64),
        decode=decode,
    )


@dataclass(frozen=True)
class Conversation:
    """Which tokens of a row an assistant wrote, and what is wrong with the row, if anything."""

    scored: NDArray[np.bool_]
    fault: str | None


def read_conversation(tokens: HarmonyTokens, ids: NDArray[np.int32]) -> Conversation:
    """A row as its messages; content of assistant messages is scored, delimiters never.

    Content runs from <|message|> of a message whose role is `assistant` (any channel or recipient)
    to the first of <|end|>, <|call|>, <|return|>, <|start|>, or to the end of the row. A row is
    well-formed if it is messages, each closed but for the last, which may be cut anywhere, with
    nothing but white space and other special tokens between them.
    """
    mask = np.zeros(len(ids), bool)
    special = np.isin(ids, tokens.special)
    faults: list[str] = []
    role_start = content_start = -1  # outside a message both are
    outside = 0
    assistant = False

    def stray(end: int) -> None:
        text = ids[outside:end][~special[outside:end]]
        if len(text) and tokens.decode(text.tolist()).strip():
            faults.append("text or a delimiter outside a message")

    for position in map(int, np.flatnonzero(special)):
        token = int(ids[position])
        if token == tokens.start:
            if content_start >= 0:
                mask[content_start:position] = assistant
                faults.append("a message that is not closed before the next <|start|>")
            elif role_start >= 0:
                faults.append("a header without <|message|>")
            else:
                stray(position)
            role_start, content_start, assistant = position + 1, -1, False
        elif content_start >= 0:
            if token in tokens.closing:
                mask[content_start:position] = assistant
                content_start, outside = -1, position + 1
            elif token == tokens.message:
                faults.append("<|message|> inside a message")
        elif role_start >= 0:
            if role_start > 0:
                assistant = _role(tokens, ids[role_start:position]) == "assistant"
                role_start = 0  # the role is read; what follows it up to <|message|> is header
            if token == tokens.message:
                content_start, role_start = position + 1, -1
            elif token in tokens.closing:
                faults.append("a header without <|message|>")
        elif token == tokens.message or token in tokens.closing:
            faults.append("text or a delimiter outside a message")
    if content_start >= 0:
        mask[content_start:] = assistant
    elif role_start < 0:
        stray(len(ids))
    return Conversation(mask & ~special, faults[0] if faults else None)


def _role(tokens: HarmonyTokens, header: NDArray[np.int32]) -> str:
    words = tokens.decode(header.tolist()).split()
    return words[0] if words else ""
