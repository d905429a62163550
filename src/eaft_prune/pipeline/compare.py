"""A base model and its candidates, measured alike: reports, changes, and the gate's verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from eaft_prune.config import EvalSettings, GateSettings
from eaft_prune.core.types import EvalKey, Evaluation, UserError
from eaft_prune.core.verdict import Changes, Comparison
from eaft_prune.maths.divergence import Apart
from eaft_prune.maths.intervals import changes
from eaft_prune.maths.metrics import distances, pack_report
from eaft_prune.stages.gate import gate


def compare(
    eval_settings: EvalSettings,
    gate_settings: GateSettings,
    base: Evaluation,
    candidates: Sequence[Evaluation],
) -> Comparison:
    """Reports of base and candidates, and the gate's verdict on each candidate.

    Raises UserError unless all were measured on the same tokens under the same conditions.
    """
    names = [candidate.model for candidate in candidates]
    if len(set(names)) != len(names):
        raise UserError(f"two candidates have one name: {', '.join(names)}")
    for candidate in candidates:
        _check_paired(base, candidate, eval_settings.top_k)
    sides = (base, *candidates)
    apart = {side.model: _apart(gate_settings, base, side) for side in sides}
    reports = {
        side.model: {
            key: pack_report(
                scores,
                base.scores[key],
                eval_settings.cc_quantile,
                gate_settings.measured,
                base.rows[key],
                apart[side.model][key],
            )
            for key, scores in side.scores.items()
        }
        for side in sides
    }
    found = {
        c.model: _changes(eval_settings, gate_settings, base, c, apart[c.model]) for c in candidates
    }
    verdicts = {
        label: gate(gate_settings, reports[base.model], reports[label], of_candidate)
        for label, of_candidate in found.items()
    }
    return Comparison(base, tuple(candidates), reports, verdicts, found)


def _apart(
    settings: GateSettings, base: Evaluation, other: Evaluation
) -> dict[EvalKey, dict[str, Apart]]:
    """Made once for report and changes: they are the dearest part of both."""
    return {
        key: distances(base.scores[key], scores, base.rows[key], settings.measured)
        for key, scores in other.scores.items()
    }


def _changes(
    eval_settings: EvalSettings,
    gate_settings: GateSettings,
    base: Evaluation,
    other: Evaluation,
    apart: Mapping[EvalKey, Mapping[str, Apart]],
) -> dict[EvalKey, Changes]:
    found = {
        key: changes(
            base.scores[key],
            scores,
            base.rows[key],
            eval_settings.cc_quantile,
            confidence=gate_settings.confidence,
            metrics=gate_settings.measured,
            apart=apart[key],
        )
        for key, scores in other.scores.items()
    }
    return {key: change for key, change in found.items() if change is not None}


def _check_paired(base: Evaluation, candidate: Evaluation, top_k: int | None) -> None:
    if candidate.model == base.model:
        raise UserError(f"both sides are called {base.model!r}")
    asked = dict(base.conditions) | ({} if top_k is None else {"top_k": top_k})
    if asked != dict(candidate.conditions):
        raise UserError(
            f"{candidate.model} was evaluated under {dict(candidate.conditions)}, {base.model} "
            f"under {dict(base.conditions)}: the gate compares like with like"
        )
    for key in {*base.token_digests, *candidate.token_digests}:
        mine, theirs = base.token_digests.get(key), candidate.token_digests.get(key)
        if mine != theirs:
            raise UserError(
                f"pack {key[0]} at seq_len {key[1]}: {base.model} and {candidate.model} were not "
                "evaluated on the same tokens"
            )
