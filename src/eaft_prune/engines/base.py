"""What stages ask of whoever runs the model, and what a run must know of an engine beforehand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from eaft_prune.checkpoints.read import ModelFiles
from eaft_prune.config import EngineSettings, Experiment, RuntimeSettings
from eaft_prune.core.generation import Decoding
from eaft_prune.core.types import Blocks, Divergence, KeepPlan, Likeliest, TokenScores, Trace

OnTokens = Callable[[int], None]  # tokens done since the last call


class Scorer(Protocol):
    """A model that scores tokens, wherever it runs."""

    @property
    def conditions(self) -> Mapping[str, Any]:
        """What both sides of a comparison must have in common: engine, dtype, top_k ..."""

    def score(self, blocks: Blocks, on_tokens: OnTokens) -> TokenScores:
        """log p and H of every scored token, in block order."""


class Comparer(Scorer, Protocol):
    """A scorer that tells the likeliest tokens, and what it makes of another's."""

    def likeliest(
        self, blocks: Blocks, k: int, on_tokens: OnTokens
    ) -> tuple[TokenScores, Likeliest]:
        """Scores, and the k likeliest tokens of every scored one."""

    def diverge(
        self, blocks: Blocks, base: Likeliest, on_tokens: OnTokens
    ) -> tuple[TokenScores, Divergence]:
        """Scores, and how far they are from the model that those likeliest tokens are of."""


class Writer(Scorer, Protocol):
    """A scorer that writes on."""

    def generate(
        self, prompts: Sequence[Sequence[int]], how: Decoding, first: int, on_tokens: OnTokens
    ) -> tuple[list[list[int]], list[bool]]:
        """What follows each prompt, and whether it ended by itself; the first is number `first`."""


class Profiler(Comparer, Writer, Protocol):
    """A scorer that also shows its routing, and can do without some experts."""

    def trace(self, blocks: Blocks, on_tokens: OnTokens) -> Trace:
        """Scores, with the routing at every predictor position."""

    def masked(self, plan: KeepPlan) -> AbstractContextManager[None]:
        """Inside, experts outside the plan are never routed to."""


@dataclass(frozen=True)
class EngineOptions:
    """The settings that an engine is opened with."""

    engine: EngineSettings
    runtime: RuntimeSettings
    entropy_top_k: int
    kl_top_k: int = 0

    @classmethod
    def of(cls, experiment: Experiment) -> EngineOptions:
        """Those of an experiment's own engine."""
        asked = experiment.eval
        kl_top_k = asked.kl_top_k or 0
        return cls(experiment.engine, experiment.runtime, asked.entropy_top_k, kl_top_k)

    @property
    def most_likeliest(self) -> int:
        """How many of the likeliest tokens a server is asked for at most."""
        return max(self.entropy_top_k, self.kl_top_k)


@dataclass(frozen=True)
class EngineKind:
    """An engine by its name in `engine.name`: what is known of it before a model is opened."""

    name: str
    # what evaluations depend on besides weights and tokens: part of their stage keys
    key: Callable[[EngineOptions], dict[str, Any]]
    # of a model with this top_k: what both sides of a comparison must share; None: its scorer says
    conditions: Callable[[EngineOptions, int], dict[str, Any] | None]
    # checkpoint, its top_k, a file for a server's log
    open: Callable[[EngineOptions, ModelFiles, int, Path], Scorer]
    profiles: bool = False  # its scorers are Profilers: they mask experts too
    compares: bool = False  # its scorers are Comparers
    writes: bool = False  # its scorers are Writers
    # whether what a scorer said of a checkpoint holds as long as the key does
    lasting: Callable[[EngineOptions], bool] = lambda options: True
    # what is asked before anything is read, of blocks of so many tokens and a checkpoint's path:
    # raises UserError where a server does not answer, serves another, or less than that
    check: Callable[[EngineOptions, int, Path], None] = lambda options, longest, path: None
