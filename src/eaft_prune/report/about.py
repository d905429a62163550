"""What a report opens with: what was pruned from what, and by which run, as far as it knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime

from eaft_prune.checkpoints.read import open_model
from eaft_prune.checkpoints.size import parameters
from eaft_prune.config import Experiment
from eaft_prune.core.outcome import Outcome, Selection, StageRecord
from eaft_prune.core.provenance import as_text
from eaft_prune.records.lock import code_state
from eaft_prune.report.experts import method

_TIMED = ("profile", "evaluate")


def about(
    experiment: Experiment,
    outcome: Outcome,
    records: Sequence[StageRecord],
    command: str,
    now: datetime,
) -> dict[str, str]:
    """Label -> fact, in reading order; what this run does not know is left out.

    Machine and speed are those of stages that were computed here: others came from the store.
    """
    here = [record for record in records if not record.cached]
    facts = {
        "base": _base(experiment, outcome),
        "pruning": None if outcome.selection is None else _pruning(outcome.selection),
        **_sizes(outcome),
        "date": f"{now:%Y-%m-%d %H:%M %Z}",
        "code": _code(),
        "machine": _machine(experiment) if _rates(here) else None,
        "dtype": _dtype(outcome),
        "speed": ", ".join(f"{kind} {rate:,.0f} tokens/s" for kind, rate in _rates(here).items()),
        "command": command,
    }
    return {label: fact for label, fact in facts.items() if fact}


def _base(experiment: Experiment, outcome: Outcome) -> str | None:
    if outcome.base is None:
        return None
    model = experiment.model
    hub = " at ".join(filter(None, (model.hub_id, model.revision)))
    return f"{model.name} ({hub})" if hub else model.name


def _pruning(selection: Selection) -> str:
    plan = selection.plan
    kept = plan.size.replace("to", " to ")
    return f"{kept} of {plan.n_experts} experts a layer, {method(selection)}"


def _sizes(outcome: Outcome) -> dict[str, str]:
    """Of the base, and of the checkpoint if one was written."""
    models = [open_model(one.path) for one in (outcome.base, outcome.checkpoint) if one is not None]
    if outcome.base is None:
        return {}
    return {
        "weights": " → ".join(f"{model.weight_bytes / 1e9:.4g} GB" for model in models),
        "parameters": " → ".join(f"{parameters(model):,}" for model in models),
    }


def _code() -> str:
    state = code_state()
    known = f"eaft_prune {state['version']}"
    if state["commit"] != "unknown":
        known += f", commit {state['commit'][:12]}"
    return known + (" with uncommitted changes" if state.get("dirty") else "")


def _machine(experiment: Experiment) -> str | None:
    """What computes here; servers may be elsewhere."""
    if experiment.engine.base_url is not None:
        return None
    from eaft_prune.engines.machine import describe  # torch

    machine = describe(experiment.runtime)
    what = [machine["gpu"] or machine["cpu"]]
    if machine["device"] == "cpu" and machine["threads"]:
        what.append("1 thread" if machine["threads"] == 1 else f"{machine['threads']} threads")
    return ", ".join([*what, machine["system"]])


def _dtype(outcome: Outcome) -> str | None:
    if outcome.comparison is None or "dtype" not in outcome.comparison.base.conditions:
        return None
    return as_text(outcome.comparison.base.conditions["dtype"])


def _rates(records: Sequence[StageRecord]) -> Mapping[str, float]:
    """Tokens per second of all stages of a kind."""
    took: dict[str, tuple[float, float]] = {}
    for record in records:
        kind, facts = record.stage.split("/")[0], record.facts
        if kind in _TIMED and (rate := facts.get("tokens_per_s")):
            tokens, seconds = took.get(kind, (0.0, 0.0))
            took[kind] = (tokens + facts["tokens"], seconds + facts["tokens"] / rate)
    return {kind: tokens / seconds for kind, (tokens, seconds) in took.items()}
