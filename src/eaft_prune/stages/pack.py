"""Rows of text -> blocks of exactly S tokens with their scored positions."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from eaft_prune.config import PacksSettings
from eaft_prune.core.types import UNION, Blocks, UserError
from eaft_prune.packs.harmony import ASSISTANT_START, HarmonyTokens, assistant_mask

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


@dataclass(frozen=True)
class BlockRequest:
    """Which blocks: `num_blocks` of `seq_len` tokens of one pack (or UNION) and part."""

    pack: str
    part: Part
    seq_len: int
    num_blocks: int
    seed: int | None
    setting: str = field(compare=False)  # the one to lower where rows are too few

    @property
    def identity(self) -> dict[str, Any]:
        """What the blocks depend on: part of a stage key."""
        return {name: value for name, value in vars(self).items() if name != "setting"}


def pack(
    settings: PacksSettings,
    request: BlockRequest,
    rows: Mapping[str, Sequence[str]],
    tokenizer: Tokenizer,
    on_tokens: Callable[[int], None] = lambda tokens: None,
) -> Blocks:
    """Rows tokenised, each followed by EOS, cut into blocks of exactly S tokens.

    Rows come in file order, or in an order drawn by `seed`; UNION takes one row of each pack in
    turn, packs that end early dropping out. With split=hash a row belongs to the profiling part
    iff the hash of its text says so, so equal texts never fall on both sides. Raises UserError when
    there are too few rows, or a pack of harmony text holds no assistant message.
    """
    names = list(rows) if request.pack == UNION else [request.pack]
    chosen = {name: _part(settings, request, name, rows[name]) for name in names}
    need = request.num_blocks * request.seq_len
    ids: list[NDArray[np.int32]] = []
    scored: list[NDArray[np.bool_]] = []
    owner: list[NDArray[np.int32]] = []
    row_packs: list[int] = []
    sha = hashlib.sha256()
    have = 0
    for batch in _batches(_interleave(chosen)):
        for (pack_index, text), row_ids in zip(
            batch, tokenizer.encode([text for _, text in batch]), strict=True
        ):
            if have >= need:
                break
            row = np.array([*row_ids, tokenizer.eos], np.int32)
            mask = np.append(_scored(settings, tokenizer, row[:-1]), False)
            ids.append(row)
            scored.append(mask)
            owner.append(np.append(np.full(len(row_ids), len(row_packs), np.int32), -1))
            row_packs.append(pack_index)
            sha.update(hashlib.sha256(text.encode()).digest())
            have += len(row)
            on_tokens(len(row))
        if have >= need:
            break
    if have < need:
        raise UserError(
            f"pack {request.pack}: {request.num_blocks} blocks of {request.seq_len} tokens need "
            f"{need} tokens; its {len(row_packs)} {_part_name(settings, request)}rows give {have}, "
            f"enough for {have // request.seq_len} blocks: lower {request.setting}"
        )
    shape = (request.num_blocks, request.seq_len)
    scored_BS = np.concatenate(scored)[:need].reshape(shape)
    scored_BS[:, 0] = False  # nothing in the block predicts its first token
    if not scored_BS.any():
        raise UserError(f"pack {request.pack}: no assistant span in {request.num_blocks} blocks")
    return Blocks(
        pack=request.pack,
        seq_len=request.seq_len,
        ids_BS=np.concatenate(ids)[:need].reshape(shape),
        scored_BS=scored_BS,
        row_BS=np.concatenate(owner)[:need].reshape(shape),
        row_packs=np.array(row_packs, np.int32),
        packs=tuple(names),
        rows_digest=sha.hexdigest(),
    )


def _scored(
    settings: PacksSettings, tokenizer: Tokenizer, ids: NDArray[np.int32]
) -> NDArray[np.bool_]:
    """Which tokens of a row are scored: those an assistant wrote, or in plain text all."""
    if settings.format == "plain":
        return np.ones(len(ids), bool)
    return assistant_mask(tokenizer.harmony, ids)


def in_profile_part(text: str, fraction: float) -> bool:
    """Whether a row's hash puts it into the profiling part."""
    head = hashlib.sha256(text.encode()).digest()[:8]
    return int.from_bytes(head, "big") < fraction * 2**64


def _part(
    settings: PacksSettings, request: BlockRequest, name: str, texts: Sequence[str]
) -> list[str]:
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
