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
            "whose tokenizer knows the format, or score whole rows with packs.format=plain"
        )
    return HarmonyTokens(
        start=special_ids["<|start|>"],
        message=special_ids["<|message|>"],
        closing=frozenset(special_ids[token] for token in _CLOSING),
        special=np.array(sorted(special_ids.values()), np.int64),
        decode=decode,
    )


def assistant_mask(tokens: HarmonyTokens, ids: NDArray[np.int32]) -> NDArray[np.bool_]:
    """True for content tokens of assistant messages in one row; delimiters are never true.

    Content runs from <|message|> of a message whose role is `assistant` (any channel or recipient)
    to the first of <|end|>, <|call|>, <|return|>, or to the end of the row.
    """
    mask = np.zeros(len(ids), bool)
    special = np.isin(ids, tokens.special)
    role_start = content_start = -1
    assistant = False
    for position in np.flatnonzero(special):
        token = int(ids[position])
        if content_start >= 0:
            if token in tokens.closing:
                mask[content_start:position] = assistant
                content_start = -1
        elif token == tokens.start:
            role_start = int(position) + 1
        elif role_start >= 0:
            if role_start > 0:
                assistant = _role(tokens, ids[role_start:position]) == "assistant"
                role_start = 0  # the role is read; what follows it up to <|message|> is header
            if token == tokens.message:
                content_start, role_start = int(position) + 1, -1
    if content_start >= 0:
        mask[content_start:] = assistant
    return mask & ~special


def _role(tokens: HarmonyTokens, header: NDArray[np.int32]) -> str:
    words = tokens.decode(header.tolist()).split()
    return words[0] if words else ""
