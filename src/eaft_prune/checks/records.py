"""An exported checkpoint's records against its manifest and each other: what can be recomputed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from eaft_prune.checkpoints.read import MANIFEST, RECIPE, SCORES
from eaft_prune.checks.verify import Finding
from eaft_prune.config import PruningSettings
from eaft_prune.core.digests import digest
from eaft_prune.core.text import shortened
from eaft_prune.core.types import KeepPlan, UserError
from eaft_prune.records.manifest import Manifest
from eaft_prune.records.recipe import RecipeFile, plan_facts, read_recipe
from eaft_prune.records.scores import ScoresFile, read_scores
from eaft_prune.stages.plan import plan

_ABSENT = "absent"


@dataclass(frozen=True)
class _Said:
    """What a file says of something, and what the manifest does."""

    file: str
    name: str
    theirs: Any
    ours: Any


def check_records(manifest: Manifest) -> list[Finding]:
    """Key, criterion, pruning settings, base and plan: as recipe and scores have them.

    The key must be the digest of what the manifest says it is made from, and the plan the one that
    its pruning settings cut from the scores beside it (unless they need losses, which are not
    there). A manifest without a recipe has nothing that vouches for any of it: that is a finding.
    """
    found = _key(manifest)
    try:
        recipe = read_recipe(manifest.path / RECIPE)
        scores = read_scores(manifest.path / SCORES) if SCORES in manifest.records else None
    except UserError as error:
        return [*found, Finding(RECIPE, str(error))]
    said = [*_recipe(manifest, recipe), *(_scores(manifest, scores) if scores else ())]
    if RECIPE not in manifest.records:
        found.append(Finding(RECIPE, f"is not among the records of {MANIFEST}"))
    for item in said:
        if item.theirs != item.ours or type(item.theirs) is not type(item.ours):  # true is no 1
            ours, theirs = shortened(repr(item.ours)), shortened(repr(item.theirs))
            what = f"its {item.name} is {theirs}, that of {MANIFEST} {ours}"
            found.append(Finding(item.file, what))
    if scores is not None and manifest.pruning is not None:
        found += _plan(manifest, manifest.pruning, scores)
    return found


def _key(manifest: Manifest) -> list[Finding]:
    made = manifest.made_from
    if made is None:
        return []
    changed = made.get("compensation") is not None
    wrong = {
        "is not the digest of its made_from": manifest.key != digest(dict(made)),
        "is of another base": made["model"] != manifest.base["digest"],
        "is of another plan": made["plan"] != manifest.plan_digest,
        "is of another compensation": changed != (manifest.compensation != "none"),
    }
    return [Finding(MANIFEST, f"its key {what}") for what, holds in wrong.items() if holds]


def _recipe(manifest: Manifest, recipe: RecipeFile) -> Iterator[_Said]:
    base = {name: value for name, value in recipe.base.items() if value is not None}
    facts = plan_facts(manifest.plan) | {"digest": manifest.plan_digest}
    yield _Said(RECIPE, "version", recipe.eaft_prune, manifest.version)
    yield _Said(RECIPE, "base", base, dict(manifest.base))
    yield _Said(RECIPE, "criterion", recipe.criterion, manifest.criterion)
    yield _Said(RECIPE, "plan", recipe.plan, facts)
    if manifest.plan.keeps_all and manifest.pruning is None:
        return  # task=noop: no settings made it
    ours, theirs = manifest.pruning or {}, recipe.settings.get("pruning", {})
    for name in sorted({*theirs, *ours}):
        pair = theirs.get(name, _ABSENT), ours.get(name, _ABSENT)
        yield _Said(RECIPE, f"pruning.{name}", *pair)
    if not manifest.plan.keeps_all:  # then there is nothing to compensate
        yield _Said(RECIPE, "compensation", theirs.get("compensation"), manifest.compensation)


def _scores(manifest: Manifest, scores: ScoresFile) -> Iterator[_Said]:
    base = {name: value for name, value in scores.base.items() if value is not None}
    yield _Said(SCORES, "base", base, dict(manifest.base))
    yield _Said(SCORES, "criterion", scores.criterion, manifest.criterion)
    yield _Said(SCORES, "n_experts", scores.n_experts, manifest.plan.n_experts)
    pruning = manifest.pruning or {}
    for name, value in scores.scoring.items():
        if name != "function_sha256":  # of a module that is not here
            yield _Said(SCORES, f"scoring.{name}", value, pruning.get(name, _ABSENT))


def _plan(manifest: Manifest, pruning: Mapping[str, Any], scores: ScoresFile) -> list[Finding]:
    try:
        settings = PruningSettings.model_validate(pruning)
        if settings.selection == "marginal_loss":
            return []
        cut: KeepPlan = plan(settings, scores.scores)
    except (ValidationError, UserError) as error:
        first = shortened(" ".join(str(error).split()), 200)
        return [Finding(MANIFEST, f"its pruning settings cut no plan from {SCORES}: {first}")]
    if cut == manifest.plan:
        return []
    return [Finding(MANIFEST, f"its plan is not the one its pruning settings cut from {SCORES}")]
