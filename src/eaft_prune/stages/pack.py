"""Rows of text -> blocks of exactly S tokens with their scored positions."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from eaft_prune.config import BlockCount, PacksSettings
from eaft_prune.core.text import shortened
from eaft_prune.core.types import UNION, Blocks, Spans, UserError
from eaft_prune.packs.harmony import ASSISTANT_START, HarmonyTokens, read_conversation

VERSION = 2
_ROWS_AT_ONCE = 64

Part = Literal["profile", "eval"]


class Tokenizer(Protocol):
    """Text to ids, without added tokens; harmony raises UserError where it has none."""

    @property
    def harmony(self) -> HarmonyTokens: ...

    @property
    def eos(self) -> int: ...

    def encode(self, texts: Sequence[str]) -> list[list[int]]: ...

    def scored(self, text: str, spans: Spans) -> NDArray[np.bool_]: ...


@dataclass(frozen=True)
class BlockRequest:
    """Which blocks: `num_blocks`, or all, of `seq_len` tokens of one pack (or UNION) and part."""

    pack: str
    part: Part
    seq_len: int
    num_blocks: BlockCount
    seed: int | None
    setting: str = field(compare=False)  # the one to lower where rows are too few
    length: str = field(compare=False, default="the sequence length")  # and where a model's are

    @property
    def identity(self) -> dict[str, Any]:
        """What the blocks depend on: part of a stage key."""
        names = ("pack", "part", "seq_len", "num_blocks", "seed")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class _Row:
    """One row with the EOS that follows it."""

    pack: int
    text: str
    ids: NDArray[np.int32]
    scored: NDArray[np.bool_]
    fault: str | None


@dataclass(frozen=True)
class Packed:
    """Blocks, and how many of the rows in them are not well-formed harmony."""

    blocks: Blocks
    malformed: int
    first_fault: str | None  # of the first such row: its pack, what is wrong, how it begins


def pack(
    settings: PacksSettings,
    request: BlockRequest,
    rows: Mapping[str, Sequence[str]],
    tokenizer: Tokenizer,
    on_tokens: Callable[[int], None] = lambda tokens: None,
    said: Mapping[str, Spans] = {},
) -> Packed:
    """Rows tokenised, each followed by EOS, cut into blocks of exactly S tokens.

    Rows come in file order, or in an order drawn by `seed`; UNION takes one row of each pack in
    turn, packs that end early dropping out. With split=hash a row belongs to the profiling part
    iff the hash of its text says so, so equal texts never fall on both sides. said: what of a text
    the assistant said, where it is no harmony. Raises UserError when there are too few rows, or a
    pack of harmony text holds no assistant message.
    """
    names = list(rows) if request.pack == UNION else [request.pack]
    chosen = {name: part_of(settings, request, name, rows[name]) for name in names}
    most = math.inf if request.num_blocks == "all" else request.num_blocks * request.seq_len
    read: list[_Row] = []
    have = 0
    for row in _read(settings, chosen, tokenizer, said):
        read.append(row)
        have += len(row.ids)
        on_tokens(len(row.ids))
        if have >= most:
            break
    count = have // request.seq_len if request.num_blocks == "all" else request.num_blocks
    shape = (count, request.seq_len)
    need = count * request.seq_len
    if count == 0 or have < need:
        raise _too_few(settings, request, len(read), have)
    # of all blocks, rows behind the last: they are not in the same number of blocks either
    used = read[: int(np.searchsorted(np.cumsum([len(row.ids) for row in read]), need)) + 1]
    scored_BS = np.concatenate([row.scored for row in used])[:need].reshape(shape)
    scored_BS[:, 0] = False  # nothing in the block predicts its first token
    if not scored_BS.any():
        raise UserError(f"pack {request.pack}: no assistant span in {count} blocks")
    # the -1 makes it int64: the type in every store, and so in the keys of all that reads blocks
    owner = [
        np.append(np.full(len(row.ids) - 1, number, np.int32), -1)
        for number, row in enumerate(used)
    ]
    sha = hashlib.sha256(b"".join(hashlib.sha256(row.text.encode()).digest() for row in used))
    blocks = Blocks(
        pack=request.pack,
        seq_len=request.seq_len,
        ids_BS=np.concatenate([row.ids for row in used])[:need].reshape(shape),
        scored_BS=scored_BS,
        row_BS=np.concatenate(owner)[:need].reshape(shape),
        row_packs=np.array([row.pack for row in used], np.int32),
        packs=tuple(names),
        rows_digest=sha.hexdigest(),
    )
    faults = [
        f"{names[row.pack]}: {row.fault}, in {shortened(row.text)!r}" for row in used if row.fault
    ]
    return Packed(blocks, len(faults), faults[0] if faults else None)


def _read(
    settings: PacksSettings,
    chosen: Mapping[str, Sequence[str]],
    tokenizer: Tokenizer,
    said: Mapping[str, Spans],
) -> Iterator[_Row]:
    """The rows of UNION in order; those an assistant wrote in are scored there, plain text all."""
    for batch in _batches(_interleave(chosen)):
        texts = [text for _, text in batch]
        for (pack_index, text), ids in zip(batch, tokenizer.encode(texts), strict=True):
            row = np.array([*ids, tokenizer.eos], np.int32)
            scored, fault = np.append(np.ones(len(ids), bool), False), None
            if text in said:
                scored = np.append(tokenizer.scored(text, said[text]), False)
            elif settings.format != "plain":
                found = read_conversation(tokenizer.harmony, row[:-1])
                scored, fault = np.append(found.scored, False), found.fault
            yield _Row(pack_index, text, row, scored, fault)


def _too_few(settings: PacksSettings, request: BlockRequest, rows: int, have: int) -> UserError:
    there = have // request.seq_len
    count = 1 if request.num_blocks == "all" else request.num_blocks
    remedy = f"lower {request.length if request.num_blocks == 'all' else request.setting}"
    if there:
        remedy = f"give {request.setting}=all, or {remedy}"
    return UserError(
        f"pack {request.pack}: {count} block{'s' * (count > 1)} of {request.seq_len} tokens need "
        f"{count * request.seq_len} tokens; its {rows} {_part_name(settings, request)}rows give "
        f"{have}, enough for {there} blocks: {remedy}"
    )


def in_profile_part(text: str, fraction: float) -> bool:
    """Whether a row's hash puts it into the profiling part."""
    head = hashlib.sha256(text.encode()).digest()[:8]
    return int.from_bytes(head, "big") < fraction * 2**64


def part_of(
    settings: PacksSettings, request: BlockRequest, name: str, texts: Sequence[str]
) -> list[str]:
    """The rows of a pack that belong to the asked part, in the order that its seed draws."""
    if settings.format == "harmony" and not any(ASSISTANT_START in text for text in texts):
        raise UserError(
            f"pack {name} ({settings.files[name]}): no row has an assistant span "
            f"({ASSISTANT_START}...), so no token of it can be scored; rows that are plain text "
            "need packs.format=plain"
        )
    part = list(texts)
    if settings.split == "hash":
        wanted = request.part == "profile"
        part = [t for t in texts if in_profile_part(t, settings.profile_fraction) == wanted]
    if request.seed is not None:
        # the pack's name enters, so that packs of equal length are not shuffled alike
        name_seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
        order = np.random.default_rng([request.seed, name_seed]).permutation(len(part))
        part = [part[i] for i in order]
    return part


def _interleave(chosen: Mapping[str, Sequence[str]]) -> Iterator[tuple[int, str]]:
    for turn in zip_longest(*chosen.values()):
        for index, text in enumerate(turn):
            if text is not None:
                yield index, text


def _batches(rows: Iterator[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    batch: list[tuple[int, str]] = []
    for row in rows:
        batch.append(row)
        if len(batch) == _ROWS_AT_ONCE:
            yield batch
            batch = []
    if batch:
        yield batch


def _part_name(settings: PacksSettings, request: BlockRequest) -> str:
    return "" if settings.split == "none" else f"{request.part} "
