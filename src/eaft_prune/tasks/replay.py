"""task=replay: a locked run once more, and every field that differs."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from eaft_prune.config import Experiment, ReplaySettings, resolve_path, runs_code
from eaft_prune.core.outcome import Outcome
from eaft_prune.core.store import Store
from eaft_prune.core.text import shortened
from eaft_prune.core.types import UserError
from eaft_prune.packs import sources
from eaft_prune.pipeline.session import Session
from eaft_prune.records.lock import Drift, drift, lock, read_lock, write_lock
from eaft_prune.report.terminal import listing
from eaft_prune.tasks.task import Task

Validate = Callable[[Mapping[str, Any]], Experiment]
_DIGEST_LENGTH = 64


def run_replay(
    session: Session, out: Path, tasks: Mapping[str, Task], validate: Validate
) -> Outcome:
    """Repeat what the lock says and compare; the repetition leaves a lock of its own.

    Settings are the locked ones with replay.set over them, but for tracking and the directories.
    Fresh, everything is computed in an empty store under `out`, which is removed at the end.
    """
    settings = session.experiment.replay
    assert settings is not None, "config requires replay.* for this task"
    locked = read_lock(resolve_path(settings.lock))
    here = session.experiment
    experiment = _experiment(validate, locked["config"], settings, here)
    _check_task(tasks[experiment.task.name])
    _check_sources(experiment)
    fresh = tempfile.TemporaryDirectory(prefix="replay-", dir=out) if settings.fresh else None
    with fresh or nullcontext() as place:
        there = _fresh(experiment, Path(place)) if place else experiment
        store = Store(resolve_path(there.runtime.store_dir))
        again = replace(session, experiment=there, store=store)
        outcome = tasks[experiment.task.name].run(again, out)
        packs = again.pack_digests
        now = lock(experiment, again.records, packs, outcome, locked["overrides"])
    session.observer.artifact(write_lock(out, now))
    found, compared = drift(locked, now)
    outputs = [item for item in found if item.output]
    return Outcome(
        base=outcome.base,
        facts={
            "replayed": experiment.task.name,
            "lock": str(resolve_path(settings.lock)),
            "compared": compared,
            "drift_inputs": len(found) - len(outputs),
            "drift_outputs": len(outputs),
            "drift": [{**asdict(item), "difference": item.difference} for item in found],
        },
        text=_text(found, compared),
        differs=bool(outputs),
    )


def _experiment(
    validate: Validate, config: Mapping[str, Any], settings: ReplaySettings, here: Experiment
) -> Experiment:
    """The locked settings with changes; tracking and directories are this machine's.

    Raises UserError where settings of the lock's own run code and the lock is not trusted:
    validating them would import it.
    """
    values = {**config, "tracking": here.tracking.model_dump()}
    for key, value in settings.set.items():
        values = _with(values, key.split("."), value)
    theirs = {name: value for name, value in runs_code(values).items() if name not in settings.set}
    if theirs and not settings.trust:
        named = ", ".join(f"{name} = {shortened(repr(value))}" for name, value in theirs.items())
        raise UserError(
            f"replay.lock = {settings.lock} starts programs or imports modules: {named}; read "
            "them, then give replay.trust=true, or others by replay.set"
        )
    locked = validate(values)
    names = ("store_dir", "checkpoint_dir", "progress")
    own = {name: getattr(here.runtime, name) for name in names}
    return locked.model_copy(
        update={
            "runtime": locked.runtime.model_copy(update=own),
            # a stranger's lock signs nothing with a key of this machine's
            "export": locked.export.model_copy(update={"sign": here.export.sign}),
        }
    )


def _with(values: Mapping[str, Any], path: list[str], value: Any) -> dict[str, Any]:
    """Nested mappings with the value at `path` replaced."""
    inner = values.get(path[0])
    if len(path) > 1:
        value = _with(inner if isinstance(inner, Mapping) else {}, path[1:], value)
    return {**values, path[0]: value}


def _check_task(task: Task) -> None:
    """Raise UserError for a task that leaves no lock: this one was not written by a run."""
    if not (task.locked and task.tracked):
        raise UserError(f"replay.lock names task={task.name}, which leaves no lock to repeat")


def _check_sources(experiment: Experiment) -> None:
    """Raise UserError naming replay.set where a locked path is not on this machine."""
    path = experiment.model.path
    try:
        if path is not None and not sources.model_path(experiment.model).is_dir():
            raise UserError(f"model.path = {path} is not a directory")
        sources.pack_files(experiment.packs)
        if experiment.scores is not None and not resolve_path(experiment.scores).is_file():
            raise UserError(f"scores = {experiment.scores} is not a file")
    except UserError as error:
        raise UserError(
            f"the locked run used what is not here: {error}; if it is elsewhere: "
            "'replay.set={model.path: DIR, packs.files.NAME: FILE}'"
        ) from None


def _fresh(experiment: Experiment, place: Path) -> Experiment:
    """The same experiment with nothing to find: empty store, checkpoints and study."""
    directories = {"store_dir": str(place / "store"), "checkpoint_dir": str(place / "checkpoints")}
    search = experiment.search
    return experiment.model_copy(
        update={
            "runtime": experiment.runtime.model_copy(update=directories),
            "export": experiment.export.model_copy(update={"path": None}),
            "search": search
            and search.model_copy(update={"storage": f"journal:{place / 'study.log'}"}),
        }
    )


def _text(found: list[Drift], compared: int) -> str:
    if not found:
        return f"no drift: all {compared} fields are as locked"
    rows = [
        (
            item.field,
            _short(item.locked),
            _short(item.now),
            "" if item.difference is None else f"{item.difference:.3g}",
        )
        for item in found
    ]
    outputs = sum(item.output for item in found)
    verdict = f"{outputs} outputs drifted" if outputs else "no output drifted"
    return (
        listing(("field", "locked", "now", "difference"), rows)
        + f"\n\n{verdict}; {len(found) - outputs} inputs differ; {compared} fields compared"
    )


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.9g}"
    text = "absent" if value is None else str(value)
    hexadecimal = len(text) == _DIGEST_LENGTH and not set(text) - set("0123456789abcdef")
    return text[:12] if hexadecimal else text
