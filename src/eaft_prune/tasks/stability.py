"""How much the keep plan depends on which rows were profiled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eaft_prune.config import PruningSettings, StabilitySettings
from eaft_prune.core.outcome import Outcome
from eaft_prune.core.types import ExpertScores, KeepPlan, Trace
from eaft_prune.maths.agreement import jaccard, spearman
from eaft_prune.pipeline.arrow import check_plan_fits
from eaft_prune.pipeline.criterion import select
from eaft_prune.pipeline.session import Session
from eaft_prune.pipeline.traces import trace_of, whole_trace
from eaft_prune.stages.plan import plan
from eaft_prune.stages.score import masses, score, score_from

Found = tuple[ExpertScores, KeepPlan]


def run_stability(session: Session, out: Path) -> Outcome:
    """Agreement of scores and plans over seeds, rows and resamples; the experts it leaves open."""
    settings, pruning = session.experiment.stability, session.experiment.pruning
    assert settings is not None, "config requires stability.* for this task"
    base = session.base()
    check_plan_fits(session, base)
    selection = select(session, base)
    found = (selection.scores, selection.plan)
    trace = trace_of(session, base).value
    others = [whole_trace(session, base, seed).value for seed in settings.seeds]
    rows: dict[str, Any] = {
        "seeds": _agreement(found, [_chosen(pruning, t, base.groups) for t in others])
    }
    for share in settings.row_shares:
        part = first_rows(trace, share)
        rows[f"rows x {share:g}"] = _agreement(found, [_chosen(pruning, part, base.groups)])
    resampled = resamples(settings, pruning, trace, base.groups)
    rows["bootstrap"] = _agreement(found, resampled)
    shares_LE = kept_shares([kept for _, kept in resampled])
    facts = {
        "tokens": len(trace),
        "rows": len(np.unique(trace.row_T)),
        "agreement": rows,
        "tie_zone": {
            f"layer {layer}": {"experts": " ".join(map(str, ids)), "count": len(ids)}
            for layer, ids in enumerate(undecided(shares_LE, settings.confidence))
        },
    }
    return Outcome(selection=selection, base=base.checkpoint, facts=facts)


def first_rows(trace: Trace, share: float) -> Trace:
    """The tokens of the first rows, rounded up to a whole row of every pack's turn."""
    rows = np.unique(trace.row_T)
    last = rows[max(int(np.ceil(share * len(rows))), 1) - 1]
    return trace[trace.row_T <= last]


def resamples(
    settings: StabilitySettings, pruning: PruningSettings, trace: Trace, groups: int = 1
) -> list[Found]:
    """Scores and plans of the rows drawn with replacement, each pack's among themselves.

    The thresholds p_q and H_q stay those of the whole trace.
    """
    by_row = masses(pruning, trace, by="row")
    rng = np.random.default_rng(settings.seed)
    found = []
    for _ in range(settings.resamples):
        times_G = np.zeros(len(by_row.pack_G), np.int64)
        for pack in np.unique(by_row.pack_G):
            mine = by_row.pack_G == pack
            n = int(mine.sum())
            times_G[mine] = rng.multinomial(n, np.full(n, 1 / n))
        scores = score_from(pruning, by_row, times_G)
        found.append((scores, plan(pruning, scores, None, groups)))
    return found


def kept_shares(plans: Sequence[KeepPlan]) -> NDArray[np.float64]:
    """Share of the plans that keep each expert, [L, E]."""
    kept = np.zeros((len(plans[0].kept), plans[0].n_experts))
    for one in plans:
        for layer, ids in enumerate(one.kept):
            kept[layer, list(ids)] += 1
    return kept / len(plans)


def undecided(shares_LE: NDArray[np.float64], confidence: float) -> list[list[int]]:
    """Experts that resamples neither keep nor drop with this confidence, of every layer.

    Their distance to the cut is below the noise of drawing rows.
    """
    open_LE = (shares_LE < confidence) & (shares_LE > 1 - confidence)
    return [[int(i) for i in np.flatnonzero(open_E)] for open_E in open_LE]


def _chosen(pruning: PruningSettings, trace: Trace, groups: int) -> Found:
    scores = score(pruning, trace)
    return scores, plan(pruning, scores, None, groups)


def _agreement(found: Found, others: Sequence[Found]) -> Mapping[str, float]:
    same = np.stack([jaccard(found[1], kept) for _, kept in others])
    ranks = np.stack([spearman(found[0].score_LE, scores.score_LE) for scores, _ in others])
    return {
        "jaccard": float(same.mean()),
        "jaccard_least_layer": float(same.mean(axis=0).min()),
        "spearman": float(ranks.mean()),
        "spearman_least_layer": float(ranks.mean(axis=0).min()),
        "comparisons": len(others),
    }
