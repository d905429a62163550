"""Pieces of text on which base and candidate differ, for people to read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Passage:
    """Some tokens in a row: their text, and what each model gave them; None: not scored."""

    pack: str
    seq_len: int
    change: float  # sum of ln p_base - ln p_candidate over it, in nats
    tokens: tuple[str, ...]
    base: tuple[float | None, ...]  # p
    candidate: tuple[float | None, ...]


@dataclass(frozen=True)
class Passages:
    """Those that changed most, as files hold them."""

    found: tuple[dict[str, Any], ...]

    @property
    def value(self) -> list[Passage]:
        """The same as objects."""
        made = []
        for one in self.found:
            values: dict[str, Any] = {
                name: tuple(value) if isinstance(value, list) else value
                for name, value in one.items()
            }
            made.append(Passage(**values))
        return made
