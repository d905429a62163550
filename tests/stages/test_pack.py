"""Blocks are a plain concatenation of rows, cut; the rest is which rows, in which order."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import tiny

from eaft_prune.config import PacksSettings
from eaft_prune.core.types import UNION, Blocks, UserError
from eaft_prune.packs.harmony import read_conversation
from eaft_prune.stages.pack import BlockRequest, Packed, in_profile_part
from eaft_prune.stages.pack import pack as packed

if TYPE_CHECKING:
    from eaft_prune.packs.tokenizer import TransformersTokenizer

Rows = dict[str, list[str]]
EOS = tiny.SPECIALS.index("<|return|>")


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> TransformersTokenizer:
    from eaft_prune.packs.tokenizer import load_tokenizer

    return load_tokenizer(checkpoint)


def pack(*arguments: Any) -> Blocks:
    return packed(*arguments).blocks


def settings_of(rows: Rows, **changes: Any) -> PacksSettings:
    files = {name: f"{name}.parquet" for name in rows}
    return PacksSettings(**{"name": "test", "files": files, "split": "none", **changes})


def request(pack: str = UNION, **changes: Any) -> BlockRequest:
    values: dict[str, Any] = {
        "pack": pack, "part": "eval", "seq_len": 64, "num_blocks": 3, "seed": None,
        "setting": "eval.num_blocks",
    }  # fmt: skip
    return BlockRequest(**{**values, **changes})


def packs(*counts: int) -> Rows:
    """Packs of short rows, every row with a text of its own."""
    return {
        f"pack{p}": [
            f"<|start|>user<|message|>{p}.{i}<|end|><|start|>assistant<|message|>"
            f"{'abcdefgh'[: i % 7 + 1]}-{p}-{i}<|return|>"
            for i in range(count)
        ]
        for p, count in enumerate(counts)
    }


def round_robin(rows: Rows) -> list[tuple[int, str]]:
    """One row of each pack in turn until all are used."""
    out = []
    for turn in range(max(len(texts) for texts in rows.values())):
        for index, texts in enumerate(rows.values()):
            if turn < len(texts):
                out.append((index, texts[turn]))
    return out


def naive(
    tokenizer: TransformersTokenizer, order: Sequence[tuple[int, str]], asked: BlockRequest
) -> tuple[list[list[int]], list[list[bool]], list[list[int]], list[int]]:
    """ids, scored, row of every token and pack of every row used."""
    ids: list[int] = []
    scored: list[bool] = []
    row: list[int] = []
    used: list[int] = []
    for index, (pack_index, text) in enumerate(order):
        if len(ids) >= asked.num_blocks * asked.seq_len:
            break
        tokens = tokenizer.inner.encode(text, add_special_tokens=False)
        ids += [*tokens, EOS]
        scored += [
            *read_conversation(tokenizer.harmony, np.array(tokens, np.int32)).scored.tolist(),
            False,
        ]
        row += [index] * len(tokens) + [-1]
        used.append(pack_index)
    cut = [slice(b * asked.seq_len, (b + 1) * asked.seq_len) for b in range(asked.num_blocks)]
    blocks = [scored[c] for c in cut]
    return [ids[c] for c in cut], [[False, *b[1:]] for b in blocks], [row[c] for c in cut], used


def rows_of(tokenizer: TransformersTokenizer, blocks: Blocks) -> list[str]:
    """The texts of the rows in the blocks, put together again from ids and row numbers."""
    ids, owner = blocks.ids_BS.reshape(-1), blocks.row_BS.reshape(-1)
    return [
        tokenizer.inner.decode(ids[owner == row].tolist()) for row in range(len(blocks.row_packs))
    ]


def all_rows(
    tokenizer: TransformersTokenizer, rows: Rows, asked: BlockRequest, **changes: Any
) -> list[str]:
    """Every row of a part, in its order: all blocks of two tokens.

    At most one token is left over, and that is the last separator.
    """
    few = replace(asked, seq_len=2, num_blocks="all")
    return rows_of(tokenizer, pack(settings_of(rows, **changes), few, rows, tokenizer))


@given(
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    seq_len=st.integers(2, 50),
    num_blocks=st.integers(1, 4),
    union=st.booleans(),
)
def test_blocks_are_the_concatenation_cut(
    tokenizer: TransformersTokenizer,
    counts: list[int],
    seq_len: int,
    num_blocks: int,
    union: bool,
) -> None:
    rows = packs(*counts)
    asked = request(UNION if union else "pack0", seq_len=seq_len, num_blocks=num_blocks)
    order = round_robin(rows) if union else [(0, text) for text in rows["pack0"]]
    have = sum(len(tokenizer.encode([text])[0]) + 1 for _, text in order)
    if have < seq_len * num_blocks:
        with pytest.raises(UserError, match=f"enough for {have // seq_len} blocks"):
            pack(settings_of(rows), asked, rows, tokenizer)
        return
    ids, scored, row, used = naive(tokenizer, order, asked)
    if not np.any(scored):
        with pytest.raises(UserError, match="no assistant"):
            pack(settings_of(rows), asked, rows, tokenizer)
        return
    blocks = pack(settings_of(rows), asked, rows, tokenizer)
    assert blocks.ids_BS.tolist() == ids
    assert blocks.scored_BS.tolist() == scored
    assert blocks.row_BS.tolist() == row
    assert blocks.row_packs.tolist() == used
    assert blocks.packs == (tuple(rows) if union else ("pack0",))
    assert (len(blocks), blocks.seq_len, blocks.pack) == (num_blocks, seq_len, asked.pack)
    assert blocks.scored_tokens == int(np.sum(scored))
    assert (blocks.ids_BS.dtype, blocks.scored_BS.dtype) == (np.int32, np.bool_)


def test_many_rows_are_more_than_one_batch(tokenizer: TransformersTokenizer) -> None:
    rows = packs(150, 40)
    asked = request(seq_len=500, num_blocks=12)
    ids, scored, row, used = naive(tokenizer, round_robin(rows), asked)
    blocks = pack(settings_of(rows), asked, rows, tokenizer)
    assert len(used) > 128
    assert blocks.ids_BS.tolist() == ids
    assert blocks.scored_BS.tolist() == scored
    assert blocks.row_BS.tolist() == row


def test_first_positions_separators_and_delimiters_are_never_scored(
    tokenizer: TransformersTokenizer,
) -> None:
    rows = {"a": tiny.rows(40), "b": tiny.rows(40, seed=1)}
    for seq_len in (7, 64, 129):
        blocks = pack(settings_of(rows), request(seq_len=seq_len, num_blocks=20), rows, tokenizer)
        assert not blocks.scored_BS[:, 0].any()
        assert not blocks.scored_BS[blocks.row_BS < 0].any()
        assert (blocks.ids_BS[blocks.row_BS < 0] == EOS).all()
        assert (blocks.ids_BS[blocks.scored_BS] >= len(tiny.SPECIALS)).all()
        assert blocks.scored_BS.any()


def test_plain_text_is_scored_whole_and_needs_no_harmony(
    tokenizer: TransformersTokenizer, tmp_path: Path
) -> None:
    """Every token of a row, harmony or not; a tokenizer without its tokens will do."""
    from eaft_prune.packs.tokenizer import load_tokenizer

    tiny.write_tokenizer(tmp_path, tiny.CHATML)
    other = load_tokenizer(tmp_path)
    words = {"a": [f"the sum {i} is nine" for i in range(40)]}
    for rows, coder in ((words, other), (packs(20, 20), tokenizer)):
        asked = request(seq_len=30, num_blocks=5)
        with pytest.raises(UserError, match=r"packs\.format=plain"):
            pack(settings_of(words), asked, words, coder)
        blocks = pack(settings_of(rows, format="plain"), asked, rows, coder)
        expected = blocks.row_BS >= 0
        expected[:, 0] = False
        assert blocks.scored_BS.tolist() == expected.tolist()
        assert (blocks.ids_BS[blocks.row_BS < 0] == coder.eos).all()
    with pytest.raises(UserError, match=r"no harmony tokens.*packs\.format=plain"):
        pack(settings_of(packs(9)), request(), packs(9), other)


def test_union_is_round_robin_and_ended_packs_drop_out(tokenizer: TransformersTokenizer) -> None:
    rows = packs(2, 5, 1)
    texts = all_rows(tokenizer, rows, request())
    names = [text.split("<|message|>")[1].split("<|end|>")[0] for text in texts]
    whole = ["0.0", "1.0", "2.0", "0.1", "1.1", "1.2", "1.3", "1.4"]
    assert names == whole


def test_union_follows_the_order_of_the_packs(tokenizer: TransformersTokenizer) -> None:
    rows = packs(3, 3)
    turned = dict(reversed(rows.items()))
    asked = request(num_blocks=2)
    one, other = (pack(settings_of(r), asked, r, tokenizer) for r in (rows, turned))
    assert one.packs == ("pack0", "pack1")
    assert other.packs == ("pack1", "pack0")
    assert one.token_digest != other.token_digest


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.8])
def test_the_parts_are_disjoint_and_cover_all(
    tokenizer: TransformersTokenizer, fraction: float
) -> None:
    rows = packs(300)
    parts = {
        part: all_rows(tokenizer, rows, request(part=part), split="hash", profile_fraction=fraction)
        for part in ("profile", "eval")
    }
    profile, evaluation = parts["profile"], parts["eval"]
    assert sorted(profile + evaluation) == sorted(rows["pack0"])
    for part in (profile, evaluation):
        assert part == [text for text in rows["pack0"] if text in set(part)]  # in file order
    spread = 4 * (fraction * (1 - fraction) / 300) ** 0.5
    assert abs(len(profile) / 300 - fraction) < spread


@given(st.text(), st.floats(0.01, 0.98), st.floats(0.001, 0.01))
def test_a_larger_fraction_only_adds_rows(text: str, fraction: float, more: float) -> None:
    if in_profile_part(text, fraction):
        assert in_profile_part(text, fraction + more)


def test_equal_texts_are_never_on_both_sides(tokenizer: TransformersTokenizer) -> None:
    one = packs(30)["pack0"]
    rows = {"a": one, "b": [*one[::-1], *one]}
    seen = [
        set(all_rows(tokenizer, rows, request(part=part, seed=seed), split="hash"))
        for part, seed in (("profile", 1), ("eval", 2))
    ]
    assert not seen[0] & seen[1]
    assert seen[0] | seen[1] == set(one)


def test_without_a_split_both_parts_are_all_rows(tokenizer: TransformersTokenizer) -> None:
    rows = packs(10)
    profile, evaluation = (
        pack(settings_of(rows), request(part=part), rows, tokenizer) for part in ("profile", "eval")
    )
    assert profile.token_digest == evaluation.token_digest


def test_no_seed_is_file_order_and_a_seed_is_another(tokenizer: TransformersTokenizer) -> None:
    rows = packs(40)
    plain = all_rows(tokenizer, rows, request())
    assert plain == rows["pack0"]
    orders = [all_rows(tokenizer, rows, request(seed=seed)) for seed in (0, 1, 2, 0)]
    assert orders[0] == orders[3]
    for a, b in pairwise([plain, *orders[:3]]):
        assert a != b
    for order in orders:
        assert sorted(order) == sorted(rows["pack0"])


def test_a_seed_shuffles_packs_apart_and_alike_wherever_they_are(
    tokenizer: TransformersTokenizer,
) -> None:
    """A pack's own order depends on nothing but its rows, its name and the seed."""
    rows = packs(40, 40)
    alone = [
        [int(re.findall(r"-(\d+)<", t)[0]) for t in all_rows(tokenizer, rows, request(n, seed=3))]
        for n in rows
    ]
    assert alone[0] != alone[1]
    union = all_rows(tokenizer, rows, request(seed=3))
    assert union[0::2] == all_rows(tokenizer, rows, request("pack0", seed=3))
    only = {"pack0": rows["pack0"]}
    assert all_rows(tokenizer, only, request("pack0", seed=3)) == all_rows(
        tokenizer, rows, request("pack0", seed=3)
    )


@pytest.mark.parametrize(("part", "key"), [("profile", "profile"), ("eval", "eval")])
def test_too_few_rows_say_how_many_blocks_there_are(
    tokenizer: TransformersTokenizer, part: Any, key: str
) -> None:
    rows = packs(6)
    have = sum(len(tokenizer.encode([text])[0]) + 1 for text in rows["pack0"])
    seq_len = 20
    asked = request("pack0", part=part, seq_len=seq_len, num_blocks=1000, setting=f"{key}.x")
    assert have >= seq_len
    with pytest.raises(UserError) as caught:
        pack(settings_of(rows), asked, rows, tokenizer)
    message = str(caught.value)
    assert f"enough for {have // seq_len} blocks" in message
    assert "pack0" in message
    assert message.endswith(f"give {key}.x=all, or lower {key}.x")
    there = replace(asked, num_blocks=have // seq_len)
    assert len(pack(settings_of(rows), there, rows, tokenizer)) == have // seq_len
    with pytest.raises(UserError):
        pack(settings_of(rows), replace(there, num_blocks=there.num_blocks + 1), rows, tokenizer)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=3), st.integers(2, 90))
def test_all_blocks_are_as_many_as_the_rows_give(
    tokenizer: TransformersTokenizer, counts: list[int], seq_len: int
) -> None:
    """Counted by a loop; the same blocks, rows and digests as that number asked for."""
    rows = packs(*counts)
    have = sum(len(tokenizer.encode([text])[0]) + 1 for texts in rows.values() for text in texts)
    asked = request(seq_len=seq_len, num_blocks="all", length="eval.lengths")
    if have < seq_len:
        with pytest.raises(UserError, match=r"1 block of .* 0 blocks: lower eval\.lengths$"):
            pack(settings_of(rows), asked, rows, tokenizer)
        return
    numbered = replace(asked, num_blocks=have // seq_len)
    every, some = (pack(settings_of(rows), one, rows, tokenizer) for one in (asked, numbered))
    assert len(every) == have // seq_len
    for name, value in vars(some).items():
        assert np.array_equal(getattr(every, name), value), name
    assert asked.identity != numbered.identity


def test_a_request_is_what_it_was(tokenizer: TransformersTokenizer) -> None:
    """What the key of a pack stage is made from; where to complain is no part of it."""
    values = {"pack": "a", "part": "eval", "seq_len": 64, "num_blocks": 3, "seed": None}
    assert request("a", setting="x", length="y").identity == values
    assert request("a", setting="x") == request("a", setting="z", length="y")


GOOD = "<|start|>user<|message|>a<|end|><|start|>assistant<|message|>b<|return|>"
OPEN = "<|start|>user<|message|>a<|start|>assistant<|message|>b<|return|>"


@pytest.mark.parametrize("bad", [0, 1, 4])
def test_malformed_rows_are_counted_among_those_used(
    tokenizer: TransformersTokenizer, bad: int
) -> None:
    rows = {"good": [GOOD] * 10, "bad": [OPEN] * bad + [GOOD] * (10 - bad)}
    size = len(tokenizer.encode([GOOD])[0]) + 1
    asked = request(seq_len=size * 12, num_blocks=1)  # 12 rows: the first 6 of each
    found: Packed = packed(settings_of(rows), asked, rows, tokenizer)
    assert found.malformed == bad
    if bad:
        assert found.first_fault is not None
        assert found.first_fault.startswith("bad: a message that is not closed")
        assert "<|start|>user<|message|>a<|start|>" in found.first_fault
    else:
        assert found.first_fault is None
    plain = packed(settings_of(rows, format="plain"), asked, rows, tokenizer)
    assert (plain.malformed, plain.first_fault) == (0, None)


def test_a_pack_without_an_assistant_is_named(tokenizer: TransformersTokenizer) -> None:
    rows = {**packs(5), "mute": ["<|start|>user<|message|>hello<|end|>"] * 50}
    for name in ("mute", UNION):
        with pytest.raises(UserError, match=r"mute.*mute\.parquet.*assistant"):
            pack(settings_of(rows), request(name, seq_len=8), rows, tokenizer)


def test_a_pack_that_only_mentions_the_assistant_is_an_error(
    tokenizer: TransformersTokenizer,
) -> None:
    rows = {"a": ["<|start|>user<|message|><|start|>assistant hello<|end|>"] * 50}
    with pytest.raises(UserError, match=r"pack a: no assistant"):
        pack(settings_of(rows), request("a", seq_len=8), rows, tokenizer)


def test_digests_change_with_anything_that_is_read(tokenizer: TransformersTokenizer) -> None:
    rows = packs(12, 12)
    base = pack(settings_of(rows), request(), rows, tokenizer)
    again = pack(settings_of(rows), request(), packs(12, 12), tokenizer)
    assert (again.rows_digest, again.token_digest) == (base.rows_digest, base.token_digest)

    text = rows["pack0"][0]
    swapped = {**rows, "pack0": [rows["pack0"][1], text, *rows["pack0"][2:]]}
    edited = {**rows, "pack0": [text.replace("0.0", "0.1"), *rows["pack0"][1:]]}
    for other in (swapped, edited):
        blocks = pack(settings_of(other), request(), other, tokenizer)
        assert blocks.rows_digest != base.rows_digest
        assert blocks.token_digest != base.token_digest

    # the same tokens, another owner: what is scored changes, and the digest with it
    user = {**rows, "pack0": [text.replace("assistant", "assisstan"), *rows["pack0"][1:]]}
    assert pack(settings_of(user), request(), user, tokenizer).token_digest != base.token_digest
    unread = {**rows, "pack1": [*rows["pack1"][:-1], "another last row"]}
    assert pack(settings_of(unread), request(), unread, tokenizer).token_digest == base.token_digest


def test_the_token_digest_covers_ids_scored_positions_and_their_shape(
    tokenizer: TransformersTokenizer,
) -> None:
    rows = packs(20)
    base = pack(settings_of(rows), request(seq_len=32, num_blocks=4), rows, tokenizer)
    ids, scored = base.ids_BS.copy(), base.scored_BS.copy()
    ids[-1, -1] += 1
    scored[-1, -1] ^= True
    variants = [
        base,
        replace(base, ids_BS=ids),
        replace(base, scored_BS=scored),
        replace(base, ids_BS=base.ids_BS.reshape(2, 64), scored_BS=base.scored_BS.reshape(2, 64)),
    ]
    assert len({blocks.token_digest for blocks in variants}) == len(variants)


def test_the_rows_digest_is_over_the_rows_used(tokenizer: TransformersTokenizer) -> None:
    rows = packs(12)
    blocks = pack(settings_of(rows), request("pack0", num_blocks=2), rows, tokenizer)
    used = rows["pack0"][: len(blocks.row_packs)]
    assert len(used) < 12
    inner = b"".join(hashlib.sha256(text.encode()).digest() for text in used)
    assert blocks.rows_digest == hashlib.sha256(inner).hexdigest()


@settings(max_examples=20)
@given(st.lists(st.sampled_from(["", "é語", "<|end|>", "\n"]), max_size=5), st.integers(0, 9))
def test_odd_rows_keep_the_bookkeeping_right(
    tokenizer: TransformersTokenizer, odd: list[str], seed: int
) -> None:
    """Empty rows and rows of delimiters are rows like any other."""
    rows = {"a": [*odd, *tiny.rows(6, seed)]}
    asked = request("a", seq_len=40, num_blocks=5)
    ids, scored, row, used = naive(tokenizer, [(0, text) for text in rows["a"]], asked)
    blocks = pack(settings_of(rows), asked, rows, tokenizer)
    assert blocks.ids_BS.tolist() == ids
    assert blocks.scored_BS.tolist() == scored
    assert blocks.row_BS.tolist() == row
    assert len(blocks.row_packs) == len(used)
