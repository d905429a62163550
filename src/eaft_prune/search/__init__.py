"""Optuna over pruning settings: the only package that imports optuna.

A study is resumable: n_trials counts finished trials, whoever ran them. Plans are evaluated masked,
chunk by chunk, and a plan that any trial has evaluated is never evaluated again. What a trial draws
depends on the seed and on the finished trials alone, so a search that was killed and started again
ends as one that was not.
"""

from __future__ import annotations

from pathlib import Path

from eaft_prune.config import Experiment
from eaft_prune.core.outcome import Outcome
from eaft_prune.core.types import UserError
from eaft_prune.pipeline.session import Session


def check_search(experiment: Experiment) -> None:
    """Raise UserError where a search has nothing to search on, or to confirm its winner on."""
    if experiment.scores is not None:
        raise UserError("task=search scores experts itself: drop scores")
    if experiment.packs.split == "none":
        raise UserError(
            "task=search with packs.split = 'none' leaves no rows that the search has not seen to "
            "confirm its winner on: use packs.split=hash"
        )


def run_search(session: Session, out: Path) -> Outcome:
    """Search, then export the winner and gate it on evaluation rows the search never saw."""
    from eaft_prune.search.task import run  # optuna: not before a search

    return run(session, out)
