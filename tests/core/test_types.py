"""Which conversation a token is of."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from eaft_prune.core.types import Blocks


@given(
    st.lists(st.lists(st.integers(1, 2), min_size=1, max_size=6), min_size=1, max_size=12),
    st.integers(2, 5),
)
def test_tokens_of_equal_rows_are_of_one_conversation(texts: list[list[int]], seq_len: int) -> None:
    """Rows of few tokens, so that many are equal, with a separator after each, cut into blocks."""
    ids = [token for text in texts for token in [*text, 0]]
    row = [i for number, text in enumerate(texts) for i in [*[number] * len(text), -1]]
    count = len(ids) // seq_len
    if count == 0:
        return
    size = (count, seq_len)
    blocks = Blocks(
        pack="a",
        seq_len=seq_len,
        ids_BS=np.array(ids[: count * seq_len], np.int32).reshape(size),
        scored_BS=np.ones(size, bool),
        row_BS=np.array(row[: count * seq_len], np.int32).reshape(size),
        row_packs=np.zeros(len(texts), np.int32),
        packs=("a",),
        rows_digest="",
    )
    there = {
        number: tuple(blocks.ids_BS[blocks.row_BS == number].tolist())
        for number in range(len(texts))
    }
    found = blocks.conversation_BS
    assert (found == -1).tolist() == (blocks.row_BS == -1).tolist()
    conversations = found[found >= 0].tolist()
    expected = [there[number] for number in blocks.row_BS[found >= 0].tolist()]
    for a, one in zip(conversations, expected, strict=True):
        for b, other in zip(conversations, expected, strict=True):
            assert (a == b) == (one == other)
