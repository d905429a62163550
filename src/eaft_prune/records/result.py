"""result.json: what one run found, for programs (README.md beside)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from eaft_prune.core.files import write_atomically
from eaft_prune.core.outcome import Outcome, StageRecord
from eaft_prune.core.types import Checkpoint, EvalKey
from eaft_prune.core.verdict import Comparison, GateCheck, GateVerdict

FILE = "result.json"


def result(
    task: str,
    status: str,
    outcome: Outcome,
    records: Sequence[StageRecord],
    extra: Mapping[str, Any],
) -> dict[str, Any]:
    """The JSON object; parts the task did not make are null."""
    comparison, selection = outcome.comparison, outcome.selection
    verdicts = {} if comparison is None else comparison.verdicts
    gates = {label: _gate(verdict) for label, verdict in verdicts.items()}
    return {
        "status": status,
        "task": task,
        "gate": next(iter(gates.values()), None),
        "gates": gates,
        "beside": {} if comparison is None else {k: _gate(v) for k, v in comparison.beside.items()},
        "plan": None
        if selection is None
        else {
            "criterion": selection.criterion,
            "n_experts": selection.plan.n_experts,
            "kept": selection.plan.kept,
            "digest": selection.plan.digest,
        },
        "base": _checkpoint(outcome.base),
        "checkpoint": _checkpoint(outcome.checkpoint),
        "reports": {} if comparison is None else reports_by_name(comparison.reports),
        "changes": {} if comparison is None else reports_by_name(comparison.changes),
        "generated": {} if comparison is None else _generated(comparison),
        "tasks": {} if comparison is None else _tasks(comparison),
        "evaluations": {label: str(path) for label, path in outcome.evaluations.items()},
        "facts": dict(outcome.facts),
        "digests": {record.stage: record.output_digest for record in records},
        "seconds": {r.stage: 0.0 if r.cached else round(r.seconds, 4) for r in records},
        "stages": [
            {
                "stage": record.stage,
                "key": record.key,
                "cached": record.cached,
                "seconds": record.seconds,
                "facts": dict(record.facts),
            }
            for record in records
        ],
        **extra,
    }


def write_result(out: Path, value: Mapping[str, Any]) -> None:
    """Write `result.json` into the run's directory."""
    write_atomically(out / FILE, json.dumps(value, indent=1, allow_nan=False) + "\n")


def reports_by_name(found: Mapping[str, Mapping[EvalKey, Any]]) -> dict[str, Any]:
    """model -> pack -> length -> metrics or changes, as JSON and YAML hold them."""
    out: dict[str, Any] = {}
    for model, by_key in found.items():
        for (pack, seq_len), report in by_key.items():
            out.setdefault(model, {}).setdefault(pack, {})[str(seq_len)] = report.values()
    return out


def _generated(comparison: Comparison) -> dict[str, Any]:
    """What every candidate wrote, in numbers; the texts are in the report."""
    return {
        label: {
            "base": dict(found.base),
            "candidate": dict(found.candidate),
            "changes": found.changes.values(),
            "answered": None if found.answered is None else found.answered.values(),
            "flips": {name: asdict(one) for name, one in found.flips.items()},
            "median_first_difference": found.median_first_difference,
        }
        for label, found in comparison.generated.items()
    }


def _tasks(comparison: Comparison) -> dict[str, Any]:
    """Every candidate's scores by task; the samples are in the store."""
    return {
        label: {task: report.values() for task, report in found.items()}
        for label, found in comparison.tasks.items()
    }


def _gate(verdict: GateVerdict) -> dict[str, Any]:
    return {
        "name": verdict.gate,
        "status": verdict.status,
        "confidence": verdict.confidence,
        "plain_status": verdict.plain,
        "failed_checks": list(verdict.failed_checks),
        "undecided_checks": list(verdict.undecided_checks),
        "plain_failed_checks": list(verdict.plain_failed_checks),
        "not_measured": list(verdict.missing),
        "settled_by": None if verdict.settled_by is None else verdict.settled_by.label,
        "checks": [_check(check) for check in verdict.checks],
    }


def _check(check: GateCheck) -> dict[str, Any]:
    values = asdict(check)
    del values["decided"]
    return {**values, "outcome": check.outcome}


def _checkpoint(checkpoint: Checkpoint | None) -> dict[str, str] | None:
    if checkpoint is None:
        return None
    return {"path": str(checkpoint.path), "digest": checkpoint.digest}
