"""Optuna over pruning settings: the only package that imports optuna.

A study is resumable: n_trials counts finished trials, whoever ran them. Plans are evaluated masked,
chunk by chunk, and a plan that any trial has evaluated is never evaluated again. What a trial draws
depends on the seed and on the finished trials alone, so a search that was killed and started again
ends as one that was not.
"""

from __future__ import annotations

from pathlib import Path

from eaft_prune.core.types import Outcome
from eaft_prune.pipeline.session import Bench


def run_search(bench: Bench, out: Path) -> Outcome:
    """Search, then export the winner and gate it on evaluation rows the search never saw."""
    from eaft_prune.search.task import run  # optuna: not before a search

    return run(bench, out)
