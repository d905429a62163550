"""The study in its storage, with the sampler and pruner that the settings name."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import optuna
import sqlalchemy
from filelock import FileLock
from optuna.storages.journal import JournalFileBackend

from eaft_prune.config import SamplerSettings, SearchSettings, resolve_path
from eaft_prune.core.digests import digest
from eaft_prune.core.provenance import redact
from eaft_prune.core.types import UserError
from eaft_prune.search.problem import Problem
from eaft_prune.stages import evaluate, plan, score


def open_study(problem: Problem) -> optuna.Study:
    """The study, made if it is not there; raises UserError if it is of another problem."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    settings, identity = problem.settings, _identity(problem)
    name = settings.study or f"search-{identity[:12]}"
    # databases break when two processes make their tables at once
    with FileLock(problem.session.store.root / "search-storage.lock"):
        study = optuna.create_study(
            study_name=name,
            storage=_storage(settings.storage),
            directions=["minimize"] * len(settings.objectives),
            sampler=make_sampler(settings, 0),
            pruner=make_pruner(settings),
            load_if_exists=True,
        )
        if "identity" not in study.user_attrs:
            study.set_user_attr("identity", identity)
            study.set_user_attr("objectives", list(settings.objectives))
    if study.user_attrs["identity"] != identity:
        raise UserError(
            f"search.study = {name!r} in {redact(settings.storage)} was made with other data, "
            "space or settings: choose another search.study, or null"
        )
    return study


def make_sampler(settings: SearchSettings, draw: int) -> optuna.samplers.BaseSampler:
    """The sampler for the draw-th point: seeded by it, so that a resumed search draws on."""
    chosen = settings.sampler
    if "seed" in chosen.arguments:
        seed = int(chosen.arguments["seed"]) + draw
        chosen = chosen.model_copy(update={"arguments": {**chosen.arguments, "seed": seed}})
    return _made("search.sampler", optuna.samplers, "Sampler", chosen)


def make_pruner(settings: SearchSettings) -> optuna.pruners.BasePruner:
    """The pruner of the settings, or one that stops nobody."""
    chosen = settings.pruner or SamplerSettings(name="NopPruner")
    return _made("search.pruner", optuna.pruners, "Pruner", chosen)


def _identity(problem: Problem) -> str:
    """Digest of everything a trial's values depend on: trials of one study are comparable."""
    session, settings = problem.session, problem.settings
    experiment = session.experiment
    searched = {name.removeprefix("pruning.") for name in settings.space}
    return digest(
        {
            **settings.model_dump(
                mode="json",
                include={"space", "objectives", "seq_len", "num_blocks", "chunk_blocks"},
            ),
            "versions": [score.VERSION, plan.VERSION, evaluate.VERSION],
            "model": problem.base.digest,
            "trace": problem.trace_digest,
            "blocks": [blocks.digest for blocks in problem.blocks],
            "pruning": experiment.pruning.model_dump(
                # a function of the user's cannot be searched
                mode="json",
                exclude={"name", "function", *searched},
            ),
            "limits": {
                name: value
                for name, value in experiment.gate.model_dump(mode="json").items()
                if name.startswith("max_") or name == "metrics"
            },
            "cc_quantile": experiment.eval.cc_quantile,
            "numerics": session.profiling_kind.key(session.options),
        }
    )


def _storage(url: str) -> Any:
    if url.startswith("journal:"):
        path = resolve_path(url.removeprefix("journal:"))
        path.parent.mkdir(parents=True, exist_ok=True)
        return optuna.storages.JournalStorage(JournalFileBackend(str(path)))
    patience = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else None
    try:
        address = sqlalchemy.make_url(url)
        if address.drivername.startswith("sqlite") and address.database:
            path = resolve_path(address.database)
            path.parent.mkdir(parents=True, exist_ok=True)
            url = address.set(database=str(path)).render_as_string(hide_password=False)
        return optuna.storages.RDBStorage(url, engine_kwargs=patience)
    except Exception as error:  # sqlalchemy and its drivers raise many unrelated types
        first = redact((str(error).strip() or type(error).__name__).splitlines()[0])
        raise UserError(f"search.storage = {redact(url)!r} cannot be used: {first}") from error


def _made(setting: str, module: Any, suffix: str, chosen: SamplerSettings) -> Any:
    """An object of one of Optuna's classes by name; raises UserError naming the setting."""
    kind = getattr(module, chosen.name, None)
    names = [n for n in module.__all__ if n.endswith(suffix) and n != f"Base{suffix}"]
    if not inspect.isclass(kind) or chosen.name not in names:
        raise UserError(f"{setting}.name = {chosen.name!r}; allowed: {', '.join(names)}")
    accepted = inspect.signature(kind).parameters
    unknown = sorted(set(chosen.arguments) - set(accepted))
    if unknown:
        raise UserError(
            f"{setting}.arguments names {unknown[0]!r}; {kind.__name__} takes {', '.join(accepted)}"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        try:
            return kind(**chosen.arguments)
        except (TypeError, ValueError, ImportError) as error:
            raise UserError(f"{setting} = {chosen.name}: {error}") from error
