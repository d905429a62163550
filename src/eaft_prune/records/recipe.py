"""reap-recipe.yaml: how a checkpoint was made."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ValidationError

from eaft_prune.config import (
    CompensationSettings,
    MarginalSettings,
    PacksSettings,
    ProfileSettings,
    PruningSettings,
    Settings,
    renamed,
)
from eaft_prune.config.base import allowed
from eaft_prune.core.types import KeepPlan
from eaft_prune.records.yaml_file import read_yaml, to_yaml

_HEAD = "# How this checkpoint was made: recipe=FILE runs its settings again.\n"
# of `packs`: how rows are read and split; which files is for the user to say
PACK_SETTINGS = ("text_column", "format", "split", "profile_fraction")
# section -> what validates it, what else that wants, and its settings: nothing else is a recipe's
_SECTIONS: Mapping[str, tuple[type[Settings], dict[str, Any], tuple[str, ...]]] = {
    "packs": (PacksSettings, {"name": "recipe", "files": {"recipe": ""}}, PACK_SETTINGS),
    "profile": (ProfileSettings, {}, tuple(ProfileSettings.model_fields)),
    "pruning": (PruningSettings, {"name": "recipe"}, tuple(PruningSettings.model_fields)),
    "marginal": (MarginalSettings, {}, tuple(MarginalSettings.model_fields)),
    "compensation": (CompensationSettings, {}, tuple(CompensationSettings.model_fields)),
}


def _checked(settings: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Settings under today's names, each valid; ValueError where one is not a recipe's to set."""
    found = {}
    for section, values in renamed(settings).items():
        if section not in _SECTIONS:
            raise ValueError(
                f"{section!r} is not for a recipe to set; {allowed(section, [*_SECTIONS])}"
            )
        kind, beside, names = _SECTIONS[section]
        for key in values:
            if key not in names:
                raise ValueError(
                    f"'{section}.{key}' is not for a recipe to set; {allowed(key, names)}"
                )
        try:
            valid = kind.model_validate({**beside, **values})
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join([section, *map(str, first["loc"])])
            raise ValueError(f"{where}: {first['msg']}") from None
        found[section] = valid.model_dump(mode="json", include=set(values))
    return found


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
    settings: Annotated[dict[str, dict[str, Any]], AfterValidator(_checked)]


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
