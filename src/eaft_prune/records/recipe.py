"""reap-recipe.yaml: how a checkpoint was made."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from eaft_prune.config import Settings
from eaft_prune.core.types import KeepPlan
from eaft_prune.records.yaml_file import read_yaml, to_yaml

_HEAD = "# How this checkpoint was made: recipe=FILE runs its settings again.\n"


class RecipeFile(Settings):
    """reap-recipe.yaml: inputs by digest, settings by section, the plan that came of them."""

    format: Literal[1] = 1
    eaft_prune: str
    base: dict[str, str | None]  # label, digest, and path or hub_id with revision
    criterion: str
    packs: dict[str, str]  # name -> sha256 of its file, in UNION order
    profile_rows: str | None  # sha256 over the rows profiled on; null: nothing was profiled
    profile_tokens: str | None
    scores: str | None  # sha256 of the scores file, where that was used instead of a profile
    gate: str
    plan: dict[str, Any]  # digest, n_experts, kept
    settings: dict[str, dict[str, Any]]  # section -> key -> value


def plan_facts(plan: KeepPlan) -> dict[str, Any]:
    """A plan as files hold it."""
    kept = [list(ids) for ids in plan.kept]
    return {"digest": plan.digest, "n_experts": plan.n_experts, "kept": kept}


def recipe_text(file: RecipeFile) -> str:
    """The file as it is written."""
    return to_yaml(_HEAD, file)


def read_recipe(path: Path) -> RecipeFile:
    """Read a recipe; raises UserError naming file, key and value."""
    return read_yaml(path, RecipeFile, "recipe")
