"""Which term of the weighting does the work: one plan a term, evaluated masked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eaft_prune.config import AblateSettings, PruningSettings
from eaft_prune.core.outcome import Outcome
from eaft_prune.core.types import Evaluation, TokenScores, UserError
from eaft_prune.maths.agreement import jaccard
from eaft_prune.maths.influence import of_mean
from eaft_prune.maths.intervals import of_influence
from eaft_prune.maths.regions import REGIONS
from eaft_prune.pipeline.arrow import Origin, check_plan_fits, judge, open_base
from eaft_prune.pipeline.evaluation import Side, measure
from eaft_prune.pipeline.session import Session
from eaft_prune.pipeline.traces import trace_of
from eaft_prune.stages.plan import plan
from eaft_prune.stages.score import masses, score_from

_WEIGHTS = {"good": "w_good", "uncertain": "w_uncertain", "conflict": "w_conflict"}


def run_ablate(session: Session, out: Path) -> Outcome:
    """The full criterion, no weighting, and each region's term alone, at the same selection.

    A term whose region holds no profiled token is named and left out.
    """
    settings = session.experiment.ablate
    assert settings is not None, "config requires ablate.* for this task"
    variants = variants_of(session.experiment.pruning)
    base = open_base(session)
    check_plan_fits(session, base)
    sums = masses(session.experiment.pruning, trace_of(session, base).value)
    empty = [f"{r}_only" for i, r in enumerate(REGIONS) if not sums.mass_GRLE[:, i].any()]
    plans = {
        name: plan(how, score_from(how, sums), None, base.groups)
        for name, how in variants.items()
        if name not in empty  # it would rank nothing
    }
    session.observer.plan(plans["full"])
    measured = measure(session, base, Side("base", base))
    candidates = {
        name: measure(session, base, Side(name, base, kept)) for name, kept in plans.items()
    }
    facts: dict[str, Any] = {
        **{f"{name}_tokens": tokens for name, tokens in sums.region_tokens.items()},
        "without_tokens": " ".join(empty) or "none",
        "distinct_plans": len({kept.digest for kept in plans.values()}),
    }
    gate = session.experiment.gate
    for seq_len in gate.seq_lens:
        key = (gate.pack, seq_len)
        facts[f"{gate.pack}/{seq_len}"] = {
            name: {
                "overlap_full": float(jaccard(plans[name], plans["full"]).mean()),
                **_row(settings, measured, candidates["full"], candidates[name], key),
            }
            for name in plans
        }
    origin = Origin(base=base.checkpoint, facts=facts)
    return judge(session, out, [measured, *candidates.values()], origin)


def variants_of(pruning: PruningSettings) -> Mapping[str, PruningSettings]:
    """full: eaft weights; reap: none; the others: one region's weight, the rest 0.

    Raises UserError where a weight of 0 leaves a term with nothing to rank by, or the criterion
    has no saliency.
    """
    if pruning.saliency == "random":
        raise UserError("pruning.saliency = 'random' has no terms to ablate: use pruning=eaft_reap")
    full = pruning.model_copy(update={"weight": "eaft"})
    out = {"full": full, "reap": pruning.model_copy(update={"weight": "uniform"})}
    for region, name in _WEIGHTS.items():
        weight = getattr(pruning, name)
        if weight == 0:
            raise UserError(
                f"pruning.{name} = 0: the {region} term alone ranks nothing; give it a weight"
            )
        alone = {**dict.fromkeys(_WEIGHTS.values(), 0.0), name: weight}
        out[f"{region}_only"] = full.model_copy(update=alone)
    return out


def paired_interval(
    settings: AblateSettings,
    reference: TokenScores,
    candidate: TokenScores,
    row_T: NDArray[np.int32],
) -> tuple[float, float, float]:
    """dNLL = mean of ln p_reference - ln p_candidate, with its two-sided interval over rows.

    Above 0: the candidate is worse. Returns (value, low, high); infinite bounds of one row.
    """
    change_T = reference.logp_T.astype(np.float64) - candidate.logp_T.astype(np.float64)
    value = float(change_T.mean())
    pull = of_mean(change_T, np.unique(row_T, return_inverse=True)[1])
    if len(pull) < 2:
        return value, -math.inf, math.inf
    estimate = of_influence(value, pull, (1 + settings.confidence) / 2)
    return value, estimate.low, estimate.high


def _row(
    settings: AblateSettings,
    base: Evaluation,
    full: Evaluation,
    candidate: Evaluation,
    key: tuple[str, int],
) -> dict[str, float]:
    rows = base.rows[key]
    dnll, low, high = paired_interval(settings, base.scores[key], candidate.scores[key], rows)
    nll = -float(base.scores[key].logp_T.mean(dtype=np.float64))
    beyond = paired_interval(settings, full.scores[key], candidate.scores[key], rows)
    return {
        "dppl": float(np.exp(nll + dnll) - np.exp(nll)),
        "dnll": dnll,
        "dnll_low": low,
        "dnll_high": high,
        "against_full": beyond[0],
        "against_full_low": beyond[1],
        "against_full_high": beyond[2],
    }
