"""A base model and its candidates, measured alike: reports, changes, and the gate's verdicts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from eaft_prune.config import EvalSettings, GateSettings
from eaft_prune.core.generation import GenerationReport
from eaft_prune.core.harness import TaskReport
from eaft_prune.core.types import EvalKey, Evaluation, UserError
from eaft_prune.core.verdict import Changes, Comparison, Reports
from eaft_prune.maths.divergence import Apart
from eaft_prune.maths.intervals import changes
from eaft_prune.maths.metrics import Metric, distances, pack_report
from eaft_prune.stages import task_pairs
from eaft_prune.stages.gate import gate


@dataclass(frozen=True)
class Measured:
    """The metrics of every side, and their changes with bounds, by model label."""

    reports: Reports
    changes: Mapping[str, Mapping[EvalKey, Changes]]  # of all but the base


@dataclass(frozen=True)
class Terms:
    """What is measured of evaluations, and how sure of the changes bounds must be."""

    metrics: tuple[Metric, ...]
    cc_quantile: float
    confidence: float | None


@dataclass(frozen=True)
class Outputs:
    """What each candidate wrote and answered beside the base, as far as it was asked to."""

    generated: Mapping[str, GenerationReport] = field(default_factory=dict)
    tasks: Mapping[str, Mapping[str, TaskReport]] = field(default_factory=dict)


NOTHING = Outputs()
Measure = Callable[[Sequence[Evaluation], Terms], Measured]


def measured(sides: Sequence[Evaluation], terms: Terms) -> Measured:
    """Reports and changes of paired evaluations, the first of which is the base's."""
    base, *candidates = sides
    apart = {side.model: _apart(terms.metrics, base, side) for side in sides}
    reports = {
        side.model: {
            key: pack_report(
                scores,
                base.scores[key],
                terms.cc_quantile,
                terms.metrics,
                base.rows[key],
                apart[side.model][key],
            )
            for key, scores in side.scores.items()
        }
        for side in sides
    }
    found = {}
    for candidate in candidates:
        of_key = {
            key: changes(
                base.scores[key],
                scores,
                base.rows[key],
                terms.cc_quantile,
                confidence=terms.confidence,
                metrics=terms.metrics,
                apart=apart[candidate.model][key],
            )
            for key, scores in candidate.scores.items()
        }
        found[candidate.model] = {key: one for key, one in of_key.items() if one is not None}
    return Measured(reports, found)


def compare(
    eval_settings: EvalSettings,
    gate_settings: GateSettings,
    base: Evaluation,
    candidates: Sequence[Evaluation],
    beside: GateSettings | None = None,
    outputs: Outputs = NOTHING,
    measure: Measure = measured,
) -> Comparison:
    """Reports of base and candidates, and the gate's verdict on each candidate.

    beside: a second gate, of the same confidence, whose verdicts stand beside. measure: how the
    numbers are had.

    Raises UserError unless all were measured on the same tokens under the same conditions.
    """
    names = [candidate.model for candidate in candidates]
    if len(set(names)) != len(names):
        raise UserError(f"two candidates have one name: {', '.join(names)}")
    for candidate in candidates:
        _check_paired(base, candidate, eval_settings.top_k)
    candidates = [_compared(base, candidate) for candidate in candidates]
    metrics = _metrics(gate_settings, beside)
    terms = Terms(metrics, eval_settings.cc_quantile, gate_settings.confidence)
    found = measure((base, *candidates), terms)
    of_text = {
        label: [some for some in (report.changes, report.answered) if some is not None]
        for label, report in outputs.generated.items()
    }
    verdicts, further = (
        {
            label: gate(
                settings,
                found.reports[base.model],
                found.reports[label],
                some,
                of_text.get(label, ()),
                task_pairs.changes(outputs.tasks.get(label, {})),
            )
            for label, some in found.changes.items()
            if settings is not None
        }
        for settings in (gate_settings, beside)
    )
    return Comparison(
        base, tuple(candidates), found.reports, verdicts, found.changes, further,
        outputs.generated, tasks=outputs.tasks,
    )  # fmt: skip


def _compared(base: Evaluation, candidate: Evaluation) -> Evaluation:
    """Without its KL to another base than this."""
    if candidate.compared_with in (None, base.checkpoint_digest):
        return candidate
    alone = {
        key: replace(scores, kl_T=None, same_top_T=None) for key, scores in candidate.scores.items()
    }
    return replace(candidate, scores=alone, compared_with=None)


def _metrics(gate_settings: GateSettings, beside: GateSettings | None) -> tuple[Metric, ...]:
    more = () if beside is None else beside.measured
    return tuple({m.name: m for m in (*gate_settings.measured, *more)}.values())


def _apart(
    metrics: Sequence[Metric], base: Evaluation, other: Evaluation
) -> dict[EvalKey, dict[str, Apart]]:
    """Made once for report and changes: they are the dearest part of both."""
    return {
        key: distances(base.scores[key], scores, base.rows[key], metrics)
        for key, scores in other.scores.items()
    }


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
