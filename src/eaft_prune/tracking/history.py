"""What MLflow keeps of earlier runs, read without creating or changing anything."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from eaft_prune.core import provenance
from eaft_prune.core.outcome import RunSummary
from eaft_prune.core.types import UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient

_PAGE = 1000


@dataclass(frozen=True)
class Archive:
    """The tracking server at `uri`, for reading.

    Methods raise UserError naming `tracking.uri` when it cannot be read.
    """

    uri: str

    def runs(self, experiment: str | None = None, filter: str = "") -> tuple[RunSummary, ...]:
        """Runs of one experiment (None: of all, deleted ones too), newest first.

        Raises UserError naming `memo.filter` where MLflow cannot read the filter.
        """
        from mlflow.entities import ViewType
        from mlflow.exceptions import MlflowException

        with self._reading() as client:
            if experiment is None:
                found = _pages(
                    lambda token: client.search_experiments(
                        view_type=ViewType.ALL, page_token=token
                    )
                )
                ids = [one.experiment_id for one in found]
                return _summaries(client, ids, "", ViewType.ALL)
            named = client.get_experiment_by_name(experiment)
            if named is None:
                return ()
            try:
                return _summaries(client, [named.experiment_id], filter, ViewType.ACTIVE_ONLY)
            except MlflowException as error:
                if error.error_code != "INVALID_PARAMETER_VALUE":
                    raise
                why = provenance.one_line(error)
                raise UserError(f"memo.filter = {filter!r}: MLflow cannot read it: {why}") from None

    def knows(self, experiment: str) -> bool:
        """Whether there is an experiment of this name."""
        with self._reading() as client:
            return client.get_experiment_by_name(experiment) is not None

    def aliased(self) -> frozenset[str]:
        """Runs that a registered model's alias points at, and digests of such checkpoints."""
        from mlflow.exceptions import MlflowException

        pinned: set[str] = set()
        with self._reading() as client:
            for model in _pages(lambda token: client.search_registered_models(page_token=token)):
                for version in model.aliases.values():
                    found = client.get_model_version(model.name, version)
                    pinned.add(found.run_id or "")
                    model_id = getattr(found, "model_id", None)
                    if model_id is None and str(found.source).startswith("models:/m-"):
                        model_id = str(found.source).removeprefix("models:/")
                    if model_id is None:
                        continue
                    try:
                        logged = client.get_logged_model(model_id)
                    except MlflowException as error:
                        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                            raise
                        continue  # the version outlived its model
                    pinned |= {logged.source_run_id or "", logged.tags.get("digest", "")}
        return frozenset(pinned - {""})

    def schema(self) -> tuple[str, str] | None:
        """The database's schema revision and the one this MLflow wants; None if it is no database.

        An empty database has the revision `none`.
        """
        if not is_database(self.uri):
            return None
        import sqlalchemy
        from mlflow.store.db import utils

        with self._reading(connect=False):
            address = sqlalchemy.make_url(self._resolved())
            engine = sqlalchemy.create_engine(address, poolclass=sqlalchemy.NullPool)
            try:
                # nothing public tells revisions without changing the database
                return (
                    str(utils._get_schema_version(engine)).lower(),
                    str(utils._get_latest_schema_revision()),
                )
            finally:
                engine.dispose()

    def damage(self) -> str | None:
        """What SQLite finds wrong with its file, or None; of other databases their servers know."""
        if not urlsplit(self.uri).scheme.startswith("sqlite"):
            return None
        import sqlalchemy

        with self._reading(connect=False):
            engine = sqlalchemy.create_engine(self._resolved(), poolclass=sqlalchemy.NullPool)
            try:
                with engine.connect() as connection:
                    found = connection.exec_driver_sql("PRAGMA integrity_check(1)").scalar()
                return None if found == "ok" else " ".join(str(found).split())
            finally:
                engine.dispose()

    def close(self, run: RunSummary, reason: str) -> None:
        """Set a zombie run to KILLED."""
        with self._reading() as client:
            client.set_tag(run.run_id, "killed.reason", reason)
            client.set_terminated(run.run_id, "KILLED")

    def _resolved(self) -> str:
        from eaft_prune.tracking.address import resolve

        place = local_place(self.uri)
        if place is not None and not is_there(place):
            raise UserError(
                f"tracking.uri = {self.uri!r}: {place} is not there: no run was tracked"
            )
        return resolve(self.uri)[0]

    @contextmanager
    def _reading(self, connect: bool = True) -> Iterator[Any]:
        from eaft_prune.tracking.lifecycle import set_environment

        set_environment()
        from mlflow import MlflowClient

        from eaft_prune.tracking.address import probe, root
        from eaft_prune.tracking.server import FAILURES

        try:
            uri = self._resolved()
            probe(uri)
            yield MlflowClient(tracking_uri=uri) if connect else None
        except UserError:
            raise
        except (*FAILURES, ValueError) as error:
            where, why = provenance.redact(self.uri), provenance.one_line(root(error))
            raise UserError(f"tracking.uri = {where!r} cannot be read: {why}") from error


def local_place(uri: str) -> Path | None:
    """The SQLite file or the directory that a tracking URI names, None for servers."""
    parts = urlsplit(uri)
    kind = parts.scheme.split("+")[0]
    if kind == "sqlite":
        import sqlalchemy

        try:
            database = sqlalchemy.make_url(uri).database
        except sqlalchemy.exc.ArgumentError:
            database = None  # whoever opens it says what is wrong
        return Path(database).expanduser().resolve() if database else None
    if kind in ("", "file") and uri != "databricks":
        path = url2pathname(parts.path) if kind else uri
        return Path(path).expanduser().resolve()
    return None


def is_there(place: Path) -> bool:
    """Whether there is something to read: an empty file is no database yet."""
    return place.is_dir() or (place.exists() and place.stat().st_size > 0)


def is_database(uri: str) -> bool:
    """Whether runs are kept in a database, whose schema has a version."""
    kind = urlsplit(uri).scheme.split("+")[0]
    return kind in ("sqlite", "postgresql", "mysql", "mssql")


def live(runs: Sequence[RunSummary]) -> list[RunSummary]:
    """RUNNING runs whose process is not known to be gone."""
    return [run for run in runs if run.status == "RUNNING" and not provenance.is_dead(run.tags)]


def zombies(runs: Sequence[RunSummary]) -> list[RunSummary]:
    """RUNNING runs whose process on this host is gone."""
    return [run for run in runs if run.status == "RUNNING" and provenance.is_dead(run.tags)]


def _summaries(
    client: MlflowClient, experiments: list[str], filter: str, view: Any
) -> tuple[RunSummary, ...]:
    if not experiments:
        return ()
    found = _pages(
        lambda token: client.search_runs(
            experiments, filter, view, max_results=_PAGE, page_token=token
        )
    )
    return tuple(
        RunSummary(
            run_id=run.info.run_id,
            name=run.info.run_name or "",
            status=run.info.status,
            active=run.info.lifecycle_stage == "active",
            started=run.info.start_time / 1000,
            ended=run.info.end_time / 1000 if run.info.end_time else None,
            params=dict(run.data.params),
            tags=dict(run.data.tags),
            metrics=dict(run.data.metrics),
            packs=dict(_packs(run)),
        )
        for run in found
    )


def _packs(run: Any) -> Iterator[tuple[str, str]]:
    """sha256 and path of every pack that a run noted as read from this machine."""
    for entry in run.inputs.dataset_inputs if run.inputs else ():
        source = json.loads(entry.dataset.source)
        digests = [tag.value for tag in entry.tags if tag.key == "digest"]
        if digests and "uri" in source:
            yield digests[0], source["uri"]


def _pages(page: Callable[[str | None], Any]) -> Iterator[Any]:
    token: str | None = None
    while True:
        found = page(token)
        yield from found
        if not found.token:
            return
        token = found.token
