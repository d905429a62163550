"""One run of a stage, as the store needs to know it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from eaft_prune.core.digests import digest

T = TypeVar("T")


def no_facts(value: Any, seconds: float) -> Mapping[str, Any]:
    """Of a step whose record needs no summary."""
    return {}


@dataclass(frozen=True)
class Step(Generic[T]):
    """A stage's output: what it depends on, and how it is made where the store has it not.

    The first part of `name` (up to `/`) is the stage; the rest tells its runs apart in the records
    and is not part of the key.
    """

    name: str
    version: int  # of the stage: raised when equal settings and inputs give other outputs
    settings: Mapping[str, Any]
    inputs: Mapping[str, str]  # name -> digest
    kind: type[T]
    compute: Callable[[], T]
    facts: Callable[[T, float], Mapping[str, Any]] = no_facts  # of the value and its seconds

    @property
    def stage(self) -> str:
        """evaluate/base/UNION/1024 -> evaluate."""
        return self.name.split("/")[0]

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that the output depends on."""
        return {
            "stage": self.stage,
            "version": self.version,
            "settings": dict(self.settings),
            "inputs": dict(self.inputs),
        }

    @property
    def key(self) -> str:
        """sha256 of the canonical JSON of `identity`."""
        return digest(self.identity)
