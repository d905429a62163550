"""What a frontier is made of: sizes of a model by some methods, and what the gate says of each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from eaft_prune.core.verdict import Status

Rows = Literal["search", "proof"]  # profiling rows; evaluation rows, which no search saw


@dataclass(frozen=True)
class Point:
    """One model against the base, on the rows of the search or on those of the proof."""

    method: str  # ranking, greedy, repaired, or a rival's name
    keep_n: int | None  # experts a layer; None: a rival's, whatever it has
    gb: float  # of 10^9 bytes, tensors alone
    status: Status
    growth: float  # PPL / PPL_base - 1, where it used most of its limit
    low: float | None  # its bounds, each at the gate's confidence
    high: float | None
    holds: bool  # PASS, or all estimates within their limits and nothing sure yet
    failed: tuple[str, ...]  # labels of checks
    undecided: tuple[str, ...]
    tokens: int  # fewest scored tokens, and conversations, that a check rests on
    conversations: int
    rows: Rows
    plan: str | None = None  # digest
    path: Path | None = None  # of a checkpoint that was measured


@dataclass(frozen=True)
class Frontier:
    """Every point, the one that was proven, and what it is a frontier of."""

    model: str
    gate: str
    confidence: float | None  # of each verdict of the proof
    limit: float  # of growth
    n_experts: int
    base_gb: float
    points: tuple[Point, ...]
    answer: (
        Point | None
    )  # of the proof: what passes with the fewest experts, if anything was proven

    def of(self, rows: Rows) -> tuple[Point, ...]:
        """Points measured on these rows."""
        return tuple(point for point in self.points if point.rows == rows)
