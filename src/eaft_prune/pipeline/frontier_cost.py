"""What a frontier will try, and what that takes at most, before it starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from eaft_prune.checkpoints.model import Model
from eaft_prune.maths.bisection import most_asked
from eaft_prune.pipeline.ladder import greedy_losses, settings_of
from eaft_prune.pipeline.requests import calibration, compensating, evaluating, frontier_search
from eaft_prune.pipeline.session import Session


@dataclass(frozen=True)
class Work:
    """One part of the work, at most: tokens through the model, and bytes that are written."""

    what: str
    tokens: int
    bytes: int = 0


def work(session: Session, base: Model, sizes: Sequence[int]) -> list[Work]:
    """Every part, if nothing is in the store and every early look leaves all open."""
    experiment, settings = session.experiment, settings_of(session)
    asked = most_asked(len(sizes))
    searched = session.blocks(base, frontier_search(experiment)).value.ids_BS.size
    proven = sum(session.blocks(base, one).value.ids_BS.size for one in evaluating(experiment))
    masked = [rung for rung in settings.ladder if rung != "repaired"]
    around = min(2 * settings.curve, len(sizes)) * len(masked)
    parts = [Work("search: the base", searched)]
    for rung in settings.ladder:
        if rung == "greedy":
            marginal = greedy_losses(session)
            measured = experiment.model_copy(update={"marginal": marginal})
            block = session.blocks(base, calibration(measured)).value.ids_BS.size
            rounds = base.n_experts - sizes[0]
            again = 1 + base.n_layers * min(marginal.candidates, base.n_experts)
            passes = 1 + base.n_layers * base.n_experts + max(rounds - 1, 0) * again
            parts.append(Work("greedy: losses by masking", passes * block))
        if rung == "repaired":
            fitted = session.blocks(base, compensating(experiment)).value.ids_BS.size
            each = 2 * experiment.compensation.passes * fitted
            parts.append(
                Work(f"repair of {asked} plans", asked * each, asked * base.files.weight_bytes)
            )
        parts.append(Work(f"{rung}: {asked} sizes", asked * searched))
    if around:
        parts.append(Work(f"the curve: {around} sizes", around * searched))
    models = 1 + settings.proofs + len(settings.rivals)
    parts.append(
        Work(
            f"proof: base, {settings.proofs} sizes at most, {len(settings.rivals)} rivals",
            models * proven,
            settings.proofs * base.files.weight_bytes,
        )
    )
    return parts


def tokens_per_s(session: Session) -> float | None:
    """How fast the model was profiled, if it was."""
    rates = [
        record.facts["tokens_per_s"]
        for record in session.records
        if record.stage.startswith("profile") and "tokens_per_s" in record.facts
    ]
    return rates[-1] if rates else None
