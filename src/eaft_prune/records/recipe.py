"""reap-recipe.yaml says how a checkpoint was made, reap-scores.yaml what its plan was cut from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import yaml
from pydantic import ValidationError, model_validator

from eaft_prune import __version__
from eaft_prune.checkpoints.read import RECIPE, SCORES
from eaft_prune.config import PruningSettings, Settings, resolve_path
from eaft_prune.config.base import NonNegative, Positive
from eaft_prune.core.digests import file_digest
from eaft_prune.core.store import Stored
from eaft_prune.core.types import ExpertScores, KeepPlan, UserError
from eaft_prune.pipeline.session import Bench, Model
from eaft_prune.stages import score as scoring
from eaft_prune.stages.pack import BlockRequest

File = TypeVar("File", bound=Settings)

_PACK_SETTINGS = {"text_column", "format", "split", "profile_fraction"}
_SCORES_HEAD = "# Expert scores, higher = keep: task=plan scores=FILE cuts other plans from them.\n"
_RECIPE_HEAD = "# How this checkpoint was made: recipe=FILE runs its settings again.\n"


class LayerScores(Settings):
    """Score, positive mass (of each pack too) and selections of a layer's experts, by id."""

    layer: NonNegative
    score: tuple[float, ...]
    positive_mass: tuple[float, ...]
    pack_mass: tuple[tuple[float, ...], ...]  # one row a pack, in UNION order
    count: tuple[NonNegative, ...]


class ScoresFile(Settings):
    """reap-scores.yaml: all that a keep plan is cut from, and where it was measured."""

    format: Literal[1] = 1
    base: dict[str, str | None]  # label, digest
    criterion: str
    scoring: dict[str, Any]  # the pruning settings the scores depend on
    n_experts: Positive
    top_k: Positive
    region_tokens: dict[str, NonNegative]
    layers: tuple[LayerScores, ...]

    @model_validator(mode="after")
    def _complete(self) -> ScoresFile:
        if [item.layer for item in self.layers] != list(range(len(self.layers))):
            raise ValueError("layers must be numbered 0, 1, 2, ... in order")
        for item in self.layers:
            rows = (item.score, item.positive_mass, item.count, *item.pack_mass)
            if {len(row) for row in rows} != {self.n_experts}:
                raise ValueError(f"layer {item.layer} does not have {self.n_experts} experts")
        return self

    @property
    def scores(self) -> ExpertScores:
        """The same arrays, to the bit, as those the file was written from."""
        return ExpertScores(
            score_LE=np.array([item.score for item in self.layers], np.float64),
            positive_mass_LE=np.array([item.positive_mass for item in self.layers], np.float64),
            count_LE=np.array([item.count for item in self.layers], np.int64),
            region_tokens=self.region_tokens,
            pack_mass_PLE=np.array([item.pack_mass for item in self.layers], np.float64).transpose(
                1, 0, 2
            ),
        )


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


def files_beside(
    bench: Bench,
    base: Model,
    plan: KeepPlan,
    how: Mapping[str, Any],
    scores: ExpertScores | None,
    profiled: BlockRequest,
) -> dict[str, str]:
    """Name -> text of what lies beside an exported checkpoint: the recipe, and the scores if any.

    `how` has the criterion, and the pruning settings where they are not the experiment's own. The
    recipe names the rows of `profiled` unless nothing was profiled or scores came from a file.
    """
    experiment, rows, source = bench.experiment, dict[str, Any](), None
    criterion = how["criterion"]
    pruning = experiment.pruning
    if "pruning" in how:
        pruning = PruningSettings.model_validate(how["pruning"])
    if scores is not None and experiment.scores:
        source = file_digest(resolve_path(experiment.scores))
    elif scores is not None:
        rows = dict(bench.blocks(base, profiled).record.facts)
    measures = pruning.measured or pruning.selection == "marginal_loss"
    compensation = experiment.compensation.model_dump()
    recipe = RecipeFile(
        eaft_prune=__version__,
        base=dict(origin(bench, base)),
        criterion=criterion,
        packs={name: sha for name, (_, sha) in bench.packs.items()},
        profile_rows=rows.get("rows_digest"),
        profile_tokens=rows.get("token_digest"),
        scores=source,
        gate=experiment.gate.name,
        plan=plan_facts(plan),
        settings={
            "packs": experiment.packs.model_dump(include=_PACK_SETTINGS),
            "profile": experiment.profile.model_dump(),
            "pruning": pruning.model_dump(),
            **({"marginal": experiment.marginal.model_dump()} if measures else {}),
            **({"compensation": compensation} if pruning.compensation != "none" else {}),
        },
    )
    texts = {RECIPE: to_yaml(recipe)}
    if scores is not None:
        top_k = base.family.top_k(base.files.config)
        texts[SCORES] = to_yaml(scores_file(scores, criterion, pruning.scoring, recipe.base, top_k))
    return texts


def origin(bench: Bench, base: Model) -> Mapping[str, str]:
    """Label, digest and whereabouts (as the settings have them) of the base checkpoint."""
    where = bench.experiment.model.model_dump(exclude={"name"}, exclude_none=True)
    return {"label": bench.experiment.model.name, "digest": base.digest, **where}


def scores_file(
    scores: ExpertScores,
    criterion: str,
    scoring: Mapping[str, Any],
    base: Mapping[str, str | None],
    top_k: int,
) -> ScoresFile:
    """The contents of reap-scores.yaml."""
    by_pack = scores.pack_mass_PLE.transpose(1, 0, 2)
    rows = zip(scores.score_LE, scores.positive_mass_LE, by_pack, scores.count_LE, strict=True)
    return ScoresFile(
        base=dict(base),
        criterion=criterion,
        scoring=dict(scoring),
        n_experts=scores.score_LE.shape[1],
        top_k=top_k,
        region_tokens=dict(scores.region_tokens),
        layers=tuple(
            LayerScores(
                layer=layer,
                score=tuple(score.tolist()),
                positive_mass=tuple(positive.tolist()),
                pack_mass=tuple(map(tuple, packs.tolist())),
                count=tuple(count.tolist()),
            )
            for layer, (score, positive, packs, count) in enumerate(rows)
        ),
    )


def plan_facts(plan: KeepPlan) -> dict[str, Any]:
    """A plan as files hold it."""
    kept = [list(ids) for ids in plan.kept]
    return {"digest": plan.digest, "n_experts": plan.n_experts, "kept": kept}


def to_yaml(file: ScoresFile | RecipeFile) -> str:
    """YAML text; numbers are written by repr, so that they are read back to the bit."""
    head = _SCORES_HEAD if isinstance(file, ScoresFile) else _RECIPE_HEAD
    values = file.model_dump(mode="json")
    text: str = yaml.safe_dump(
        values, sort_keys=False, allow_unicode=True, default_flow_style=None, width=100
    )
    return head + text


def read_scores(path: Path) -> ScoresFile:
    """Read a scores file; raises UserError naming file, key and value."""
    return _read(path, ScoresFile, "scores")


def stored_scores(bench: Bench, base: Model, given: str) -> Stored[ExpertScores]:
    """The scores of a file as the output of stage score; raises UserError if they do not fit.

    Equal scores are equal bytes there, so the plan has the key that it has after a profile.
    """
    path = resolve_path(given)
    file = read_scores(path)
    _check_scores(file, bench.experiment.pruning, base.digest)
    return bench.stage(
        "score", scoring.VERSION, {}, {"file": file_digest(path)}, ExpertScores, lambda: file.scores
    )


def read_recipe(path: Path) -> RecipeFile:
    """Read a recipe; raises UserError naming file, key and value."""
    return _read(path, RecipeFile, "recipe")


def _check_scores(file: ScoresFile, settings: PruningSettings, base_digest: str) -> None:
    """Raise UserError unless profiling this base with these settings would give these scores."""
    if file.base["digest"] != base_digest:
        raise UserError(
            f"scores were measured on a checkpoint with digest {file.base['digest']}, the base has "
            f"{base_digest}: profile it (scores=null), or cut the plan alone with task=plan"
        )
    other = {k: v for k, v in file.scoring.items() if settings.scoring.get(k) != v}
    if other or set(file.scoring) != set(settings.scoring):
        wanted = " ".join(f"pruning.{name}={value}" for name, value in other.items())
        raise UserError(
            f"the scores were made with other settings than these: give {wanted}, or scores=null"
        )


def _read(path: Path, kind: type[File], key: str) -> File:
    try:
        return kind.model_validate(yaml.safe_load(path.read_text()))
    except OSError as error:
        raise UserError(f"{key} = {path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{key} = {path} is not YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{key} = {path} is no {key} file: {where} {first['msg']}") from None
