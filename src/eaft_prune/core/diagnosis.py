"""What task=doctor says of one thing it looked at."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Diagnosis:
    """Whether one thing is in order, what was found, and the command that mends it."""

    check: str
    ok: bool
    what: str
    mend: str = ""
    mended: bool = False
