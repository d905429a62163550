"""export: a plan on disk as a checkpoint, with everything that says how it was made."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eaft_prune import __version__
from eaft_prune.checkpoints.model import Model
from eaft_prune.checkpoints.read import RECIPE, SCORES
from eaft_prune.config import PruningSettings, resolve_path
from eaft_prune.core.digests import digest, file_digest
from eaft_prune.core.outcome import Selection, StageRecord
from eaft_prune.core.types import ExpertScores, KeepPlan, UserError
from eaft_prune.pipeline import compensation
from eaft_prune.pipeline.criterion import scoring_settings
from eaft_prune.pipeline.requests import scoring
from eaft_prune.pipeline.session import Session
from eaft_prune.records.recipe import PACK_SETTINGS, RecipeFile, plan_facts, recipe_text
from eaft_prune.records.scores import scores_file, scores_text
from eaft_prune.records.signature import sign
from eaft_prune.stages import export


def write(session: Session, base: Model, selection: Selection) -> Model:
    """The selection's plan as a checkpoint, opened and hashed again."""
    how = {"criterion": selection.criterion, "pruning": selection.settings}
    return write_plan(session, base, selection.plan, how, selection.scores)


def write_plan(
    session: Session,
    base: Model,
    plan: KeepPlan,
    how: Mapping[str, Any],
    scores: ExpertScores | None = None,
) -> Model:
    """A plan written as a checkpoint; `how` goes into its manifest, recipe and scores beside it."""
    path, key = target_of(session, base, plan)
    made_from = _made_from(session, base, plan)
    repaired = compensation.compensated(session, base, plan)
    how = {**how, **repaired.facts}
    target = export.Target(
        path,
        key,
        session.experiment.export.max_shard_bytes,
        {
            "base": origin(session, base),
            **how,
            **repaired.changed_tensors,
            "made_from": made_from,
        },
        _files_beside(session, base, plan, how, scores),
        session.experiment.export.pad_ragged,
        repaired.entries,
    )
    total = base.files.weight_bytes * max(len(ids) for ids in plan.kept) // plan.n_experts
    with session.bars.bar("export", total, "B") as on_bytes:
        done = export.export(base.family, base.files, plan, target, on_bytes)
    session.record(
        StageRecord(
            "export",
            key,
            done.cached,
            done.seconds,
            done.digest,
            done.path,
            {"bytes": done.bytes_written},
        )
    )
    model = session.open(done.path, "pruned")
    if model.digest != done.digest:
        raise UserError(f"{done.path} is not what was exported: move it away and run again")
    if session.experiment.export.sign:
        sign(done.path, resolve_path(session.experiment.export.sign))
    session.observer.checkpoint("pruned", model.checkpoint, base.checkpoint, how)
    return model


def target_of(session: Session, base: Model, plan: KeepPlan) -> tuple[Path, str]:
    """Where a plan's checkpoint is written, and the digest of all that it is made from."""
    settings, runtime = session.experiment.export, session.experiment.runtime
    # two bases of one name may come to one plan
    whose = f"{session.experiment.model.name}-{base.digest[:8]}"
    name = f"{whose}-keep{plan.size}-{plan.digest[:12]}"
    target = resolve_path(settings.path or str(Path(runtime.checkpoint_dir) / name))
    made = _made_from(session, base, plan)
    level = compensation.level(session, plan)
    if level and settings.path is None:
        target = target.with_name(f"{name}-{level}-{made['compensation'][:8]}")
    return target, digest(made)


def _made_from(session: Session, base: Model, plan: KeepPlan) -> dict[str, Any]:
    """All that a plan's checkpoint is made from."""
    made: dict[str, Any] = {
        "stage": "export",
        "version": export.VERSION,
        "model": base.digest,
        "plan": plan.digest,
        "max_shard_bytes": session.experiment.export.max_shard_bytes,
    }
    if compensation.level(session, plan):
        made["compensation"] = compensation.key(session, base, plan)
    return made


def origin(session: Session, base: Model) -> Mapping[str, str]:
    """Label, digest and whereabouts (as the settings have them) of the base checkpoint."""
    where = session.experiment.model.model_dump(exclude={"name"}, exclude_none=True)
    return {"label": session.experiment.model.name, "digest": base.digest, **where}


def _files_beside(
    session: Session,
    base: Model,
    plan: KeepPlan,
    how: Mapping[str, Any],
    scores: ExpertScores | None,
) -> dict[str, str]:
    """Name -> text of what lies beside an exported checkpoint: the recipe, and the scores if any.

    `how` has the criterion, and the pruning settings where they are not the experiment's own. The
    recipe names the rows that scores came from unless there are none or they came from a file.
    """
    experiment, rows, source = session.experiment, dict[str, Any](), None
    pruning = experiment.pruning
    if "pruning" in how:
        pruning = PruningSettings.model_validate(how["pruning"])
    if scores is not None and experiment.scores:
        source = file_digest(resolve_path(experiment.scores))
    elif scores is not None:
        rows = dict(session.blocks(base, scoring(experiment)).record.facts)
    measures = pruning.measured or pruning.selection == "marginal_loss"
    compensating = experiment.compensation.model_dump()
    recipe = RecipeFile(
        eaft_prune=__version__,
        base=dict(origin(session, base)),
        criterion=how["criterion"],
        packs=session.pack_digests,
        profile_rows=rows.get("rows_digest"),
        profile_tokens=rows.get("token_digest"),
        scores=source,
        gate=experiment.gate.name,
        plan=plan_facts(plan),
        settings={
            "packs": experiment.packs.model_dump(include=set(PACK_SETTINGS)),
            "profile": experiment.profile.model_dump(),
            "pruning": pruning.model_dump(),
            **({"marginal": experiment.marginal.model_dump()} if measures else {}),
            **({"compensation": compensating} if pruning.compensation != "none" else {}),
        },
    )
    texts = {RECIPE: recipe_text(recipe)}
    if scores is not None:
        how_scored = scoring_settings(pruning)
        file = scores_file(scores, recipe.criterion, how_scored, recipe.base, base.top_k)
        texts[SCORES] = scores_text(file)
    return texts
