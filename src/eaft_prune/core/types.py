"""The frozen dataclasses that flow between stages; read this first.

Shape legend: L layers, E experts, K experts per token, T scored tokens, B blocks, S tokens each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eaft_prune.core.digests import array_digest, digest

UNION = "UNION"

STORED = "stored"  # in a field's metadata: its name in files, where that is another

EvalKey = tuple[str, int]  # (pack, seq_len)

Spans = tuple[tuple[int, int], ...]  # of characters of a text: begin and end


class UserError(ValueError):
    """What the user asked for cannot be done; the message names the value and the remedy."""


@dataclass(frozen=True)
class Blocks:
    """B token blocks of exactly S tokens, with the positions that are scored.

    scored[b, t] is true where token t >= 1 of block b lies in the content of an assistant message;
    its predictor position is t - 1. row[b, t] indexes `row_packs` (-1 on separators).
    """

    pack: str
    seq_len: int
    ids_BS: NDArray[np.int32]
    scored_BS: NDArray[np.bool_]
    row_BS: NDArray[np.int32]
    row_packs: NDArray[np.int32]  # index into `packs` of every row
    packs: tuple[str, ...]
    rows_digest: str  # sha256 over the texts of the rows used, in order

    def __len__(self) -> int:
        return len(self.ids_BS)

    def __getitem__(self, some: slice | NDArray[np.integer]) -> Blocks:
        """Some of the blocks; packs and digest are those of all."""
        return replace(
            self,
            ids_BS=self.ids_BS[some],
            scored_BS=self.scored_BS[some],
            row_BS=self.row_BS[some],
        )

    @property
    def scored_tokens(self) -> int:
        return int(self.scored_BS.sum())

    @cached_property
    def conversation_BS(self) -> NDArray[np.int32]:
        """The conversation of every token: its row, equal rows being one; -1 on separators.

        What tokens of one conversation share, and what copies of it do, says nothing twice. A row
        counts as far as it is in these blocks.
        """
        row = self.row_BS.ravel()
        order = np.argsort(row, kind="stable")
        ids, starts = np.unique(row[order], return_index=True)
        first: dict[bytes, int] = {}
        same = np.full(len(ids), -1, np.int32)
        for at, tokens in enumerate(np.split(self.ids_BS.ravel()[order], starts[1:])):
            if ids[at] >= 0:
                same[at] = first.setdefault(tokens.tobytes(), len(first))
        return np.asarray(same[np.searchsorted(ids, self.row_BS)])

    @property
    def token_digest(self) -> str:
        """Digest of token ids and scored positions: two evaluations are paired iff it is equal."""
        return digest({"ids": array_digest(self.ids_BS), "scored": array_digest(self.scored_BS)})


@dataclass(frozen=True)
class TokenScores:
    """What one model said of T scored tokens: ln p <= 0, entropy in [0, 1], block index."""

    logp_T: NDArray[np.float32]  # natural log of p_t
    entropy_T: NDArray[np.float32]
    block_T: NDArray[np.int32]
    # against the base, where it was measured: KL in nats, and whether the likeliest token is its
    kl_T: NDArray[np.float32] | None = None
    same_top_T: NDArray[np.bool_] | None = None

    @property
    def p_T(self) -> NDArray[np.float64]:
        return np.exp(self.logp_T.astype(np.float64))

    def __len__(self) -> int:
        return len(self.logp_T)

    @staticmethod
    def joined(parts: Sequence[tuple[int, TokenScores]]) -> TokenScores:
        """Parts in order, each with the block it begins at; blocks are numbered as in the whole."""
        numbered = [replace(some, block_T=some.block_T + np.int32(first)) for first, some in parts]
        arrays = {
            name: np.concatenate([getattr(part, name) for part in numbered])
            for name, value in vars(numbered[0]).items()
            if value is not None
        }
        return TokenScores(**arrays)


@dataclass(frozen=True)
class Likeliest:
    """The K likeliest tokens of one model at T scored tokens, in descending order."""

    ids_TK: NDArray[np.uint16] | NDArray[np.int32]
    logp_TK: NDArray[np.float16]
    rest_T: NDArray[np.float16]  # ln of what all other tokens hold together

    def __len__(self) -> int:
        return len(self.ids_TK)

    def __getitem__(self, some: slice) -> Likeliest:
        """Those of some of the tokens."""
        return Likeliest(self.ids_TK[some], self.logp_TK[some], self.rest_T[some])


@dataclass(frozen=True)
class Divergence:
    """How far a model is from the base at T scored tokens."""

    kl_T: NDArray[np.float32]  # of base to model, in nats, >= 0
    same_top_T: NDArray[np.bool_]  # the base's likeliest token is the likeliest here, or as likely


@dataclass(frozen=True)
class Trace:
    """Routing at the predictor position of every scored token, with p_t and H_t.

    weights are the router's, multiplied onto expert outputs, norms the l2 norms of the unweighted
    expert outputs (bias included), both as used in the forward pass of the profiled model.
    """

    experts_TLK: NDArray[np.int16]
    weights_TLK: NDArray[np.float32] = field(metadata={STORED: "gates_TLK"})
    norms_TLK: NDArray[np.float32]
    scores: TokenScores
    pack_T: NDArray[np.int32]  # index into `packs`
    row_T: NDArray[np.int32]
    packs: tuple[str, ...]
    n_experts: int

    @property
    def n_layers(self) -> int:
        return int(self.experts_TLK.shape[1])

    @property
    def top_k(self) -> int:
        return int(self.experts_TLK.shape[2])

    def __len__(self) -> int:
        return len(self.experts_TLK)

    def __getitem__(self, some_T: NDArray[np.bool_]) -> Trace:
        """Some of the tokens; blocks, rows and packs keep their numbers."""
        return replace(
            self,
            experts_TLK=self.experts_TLK[some_T],
            weights_TLK=self.weights_TLK[some_T],
            norms_TLK=self.norms_TLK[some_T],
            scores=TokenScores(
                self.scores.logp_T[some_T],
                self.scores.entropy_T[some_T],
                self.scores.block_T[some_T],
            ),
            pack_T=self.pack_T[some_T],
            row_T=self.row_T[some_T],
        )


@dataclass(frozen=True)
class ExpertScores:
    """Per-expert evidence of one criterion; in all arrays higher = keep."""

    score_LE: NDArray[np.float64]
    positive_mass_LE: NDArray[np.float64]  # sum of the positive contributions to the score
    count_LE: NDArray[np.int64]  # selections of the expert among profiled tokens
    region_tokens: Mapping[str, int]  # good / uncertain / conflict -> profiled tokens
    pack_mass_PLE: NDArray[np.float64]  # positive_mass_LE of each pack's tokens alone


@dataclass(frozen=True)
class Coverage:
    """What dropped experts were to each pack in the unpruned model."""

    packs: tuple[str, ...]
    tokens_P: NDArray[np.int64]  # profiled
    lost_PL: NDArray[np.float64]  # share of the router weights; NaN where nothing was profiled


@dataclass(frozen=True)
class LayerLosses:
    """What it costs to cut one layer alone to each of N sizes, all other layers whole."""

    sizes: tuple[int, ...]  # experts kept, ascending
    loss_LN: NDArray[np.float64]  # dNLL in nats a token


@dataclass(frozen=True)
class KeepPlan:
    """The expert ids each layer keeps, sorted ascending."""

    kept: tuple[tuple[int, ...], ...]
    n_experts: int

    def __post_init__(self) -> None:
        for layer, ids in enumerate(self.kept):
            if list(ids) != sorted(set(ids)):
                raise UserError(f"keep plan: layer {layer} lists {ids}: ids must ascend, each once")
            if not ids or ids[0] < 0 or ids[-1] >= self.n_experts:
                raise UserError(
                    f"keep plan: layer {layer} keeps {ids}; ids must be in 0..{self.n_experts - 1}"
                )

    @property
    def uniform_keep_n(self) -> int | None:
        """keep_n if every layer keeps the same number of experts, else None."""
        counts = {len(ids) for ids in self.kept}
        return counts.pop() if len(counts) == 1 else None

    @property
    def mean_keep_n(self) -> float:
        """Experts kept a layer, on average."""
        return sum(len(ids) for ids in self.kept) / len(self.kept)

    @property
    def size(self) -> str:
        """Experts kept a layer as text: `24`, or `16to28` where layers differ."""
        counts = sorted({len(ids) for ids in self.kept})
        return "to".join(str(n) for n in (*counts[:1], *counts[1:][-1:]))

    @property
    def keeps_all(self) -> bool:
        return all(len(ids) == self.n_experts for ids in self.kept)

    @property
    def digest(self) -> str:
        return digest({"kept": [list(ids) for ids in self.kept], "n_experts": self.n_experts})


@dataclass(frozen=True)
class Evaluation:
    """Token scores of one model on every asked (pack, seq_len)."""

    model: str  # label: base, pruned, masked ...
    checkpoint_digest: str
    plan_digest: str | None  # of the mask, when experts were masked in the base model
    scores: Mapping[EvalKey, TokenScores]
    rows: Mapping[EvalKey, NDArray[np.int32]]  # the conversation of every token, [T]
    token_digests: Mapping[EvalKey, str]
    conditions: Mapping[str, Any]  # engine, dtype, top_k ...: both sides of a comparison must match
    compared_with: str | None = None  # digest of the base that scores.kl_T is of

    def __iter__(self) -> Iterator[EvalKey]:
        return iter(self.scores)


@dataclass(frozen=True)
class Checkpoint:
    """A model directory on disk with the digest of its weights, config and tokenizer files."""

    path: Path
    digest: str
    label: str
    weight_bytes: int | None = None  # where they were counted
