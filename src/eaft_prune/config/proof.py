"""Settings of tasks that check what earlier runs left."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from eaft_prune.config.base import Name, Settings


class CompareSettings(Settings):
    """Two saved evaluations for task=compare."""

    base: str
    """directory of the base's evaluation"""
    candidate: str
    """directory of the candidate's"""


class ReplaySettings(Settings):
    """A locked run to repeat, and what is elsewhere on this machine."""

    lock: str
    """the run.lock.yaml of a run"""
    fresh: bool = True
    """computed again in an empty store; false: what the store has is read"""
    trust: bool = False
    """also a lock that starts programs or imports modules, as its settings say; read it before"""
    set: dict[str, Any] = Field(default_factory=dict)
    """dotted setting -> value, over the locked one: {model.path: DIR, packs.files.NAME: FILE}"""


class VerifySettings(Settings):
    """An exported checkpoint to check against its manifest and its base."""

    path: str
    """the checkpoint"""
    base: str | None = None
    """the checkpoint it was cut from; null: where the manifest says"""
    load: bool = True
    """also load it with transformers on the CPU and run it"""
    public_key: str | None = None
    """file of the public Ed25519 key (PEM) that must have signed its manifest"""


class CandidateSettings(Settings):
    """A checkpoint or a plan made elsewhere, to be judged against the base."""

    name: Name = "candidate"
    """its label in reports"""
    path: str | None = None
    """the checkpoint: pruned elsewhere, merged, quantised"""
    plan: str | None = None
    """in its place a file of kept experts: llm-compressor's report, task=plan's plan.json, or
    REAP's observations (.pt), from which pruning.keep_n stay"""
    rank_by: str = "reap"
    """which of REAP's metrics, of a file of its observations"""

    @model_validator(mode="after")
    def _one_source(self) -> CandidateSettings:
        if (self.path is None) == (self.plan is None):
            raise ValueError("give exactly one of candidate.path=DIR and candidate.plan=FILE")
        if self.name == "base":
            raise ValueError("candidate.name = 'base' is the other side's: choose another")
        return self
