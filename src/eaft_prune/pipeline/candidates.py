"""Checkpoints and plans that were made elsewhere, fit to be judged against the base."""

from __future__ import annotations

from collections.abc import Sequence

from eaft_prune.checkpoints.families.base import check_plan
from eaft_prune.checkpoints.model import Model
from eaft_prune.config import CandidateSettings, resolve_path
from eaft_prune.core.types import KeepPlan, UserError
from eaft_prune.pipeline.fitting import check_ids, check_length
from eaft_prune.pipeline.requests import evaluating
from eaft_prune.pipeline.session import Session
from eaft_prune.records.kept_experts import read_kept


def opened(session: Session, base: Model, path: str, label: str) -> Model:
    """Another checkpoint, read, checked and hashed; it is scored on the base's tokens.

    Raises UserError where that would not be like with like: another number of experts a token, too
    few embeddings or positions.
    """
    model = session.open(resolve_path(path), label)
    if model.top_k != base.top_k:
        raise UserError(
            f"{model.files.path} routes each token to {model.top_k} experts, the base to "
            f"{base.top_k}: the gate compares like with like"
        )
    for request in evaluating(session.experiment):
        check_length(model, request)
        check_ids(model, request, session.blocks(base, request))
    return model


def rivals(session: Session, base: Model, paths: Sequence[str]) -> list[Model]:
    """Several of them, called as their directories; raises UserError where two have one name."""
    names = [resolve_path(path).name for path in paths]
    for name in names:
        if names.count(name) > 1 or name in ("base", "pruned"):
            raise UserError(
                f"frontier.rivals: {name!r} would be the name of two models in one table: link or "
                "rename its directory"
            )
    return [opened(session, base, path, name) for path, name in zip(paths, names, strict=True)]


def plan_given(session: Session, base: Model, settings: CandidateSettings) -> KeepPlan:
    """The experts that a file keeps; raises UserError where they are not this model's."""
    assert settings.plan is not None, "config requires candidate.path or candidate.plan"
    kept = read_kept(
        resolve_path(settings.plan), settings.rank_by, session.experiment.pruning.keep_n
    )
    numbers = base.family.layer_numbers(base.files.config)
    if unknown := sorted(set(kept) ^ set(numbers)):
        raise UserError(
            f"candidate.plan = {settings.plan!r} names layers {sorted(kept)}, and the model has "
            f"experts in {list(numbers)}: they differ in {unknown}"
        )
    largest = max(max(ids) for ids in kept.values())
    if largest >= base.n_experts:
        raise UserError(
            f"candidate.plan = {settings.plan!r} keeps expert {largest}, and the model has "
            f"{base.n_experts} a layer: it is of another model"
        )
    plan = KeepPlan(tuple(kept[number] for number in numbers), base.n_experts)
    check_plan(plan, base.n_layers, base.n_experts, base.groups)
    return plan
