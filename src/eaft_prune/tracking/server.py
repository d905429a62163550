"""The MLflow client with explicit run ids and its limits respected.

Import it through `lifecycle.prepare`, which sets the environment that mlflow reads on import.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import requests
import sqlalchemy
from mlflow import MlflowClient
from mlflow.entities import (
    Dataset,
    DatasetInput,
    InputTag,
    LoggedModel,
    LoggedModelInput,
    LoggedModelOutput,
    LoggedModelStatus,
    Metric,
    Param,
    Run,
    RunTag,
)
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

from eaft_prune.core.provenance import one_line, redact
from eaft_prune.core.types import UserError
from eaft_prune.tracking.address import create_sqlite, one_creator, probe, resolve, root, scheme
from eaft_prune.tracking.errors import TrackingError
from eaft_prune.tracking.figures import Batch
from eaft_prune.tracking.shown import TABLE, share_views, version_of

FAILURES = (
    MlflowException,
    requests.RequestException,
    sqlalchemy.exc.SQLAlchemyError,
    ImportError,  # the database driver
    OSError,
)

# what MLflow takes in one call: 100 params, 100 tags, 1000 of everything together
_BATCH = 100
_METRIC_BATCH = 800
_NAME_LENGTH = 250
_DATASET_DIGEST_LENGTH = 12  # MLflow takes 36; its run table shows them whole
# MLflow 3 opens on its view of agents and traces unless told otherwise
_UI_VIEW = "workflowType=machine_learning"
_UI_ADDRESS = "http://127.0.0.1:5000"  # of `mlflow ui`
_PAGE = 1000

# ids of logged models that this process met, by server, experiment and tags: a search is slow
_MODELS: dict[tuple[str, str, frozenset[tuple[str, str]]], str] = {}


class Server:
    """One tracking URI and one experiment on it.

    Methods raise TrackingError when the server, database or disk fails.
    """

    def __init__(self, uri: str, experiment: str) -> None:
        """Connect, and create what is missing; raises UserError if that cannot be done."""
        try:
            self.uri, artifacts = resolve(uri)
            with one_creator(self.uri):
                create_sqlite(self.uri)
                probe(self.uri)
                self._client = MlflowClient(tracking_uri=self.uri)
                self.experiment_id = self._experiment(experiment, artifacts)
                share_views(self._client, self.experiment_id)
        except UserError:
            raise
        except (*FAILURES, ValueError) as error:  # ValueError: a port that is no number
            why = one_line(root(error))
            raise UserError(f"tracking.uri = {redact(uri)!r} cannot be used: {why}") from error

    def _experiment(self, name: str, artifacts: str | None) -> str:
        found = self._client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(self._client.create_experiment(name, artifacts))
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            found = self._client.get_experiment_by_name(name)
        if found is None or found.lifecycle_stage != "active":
            raise UserError(
                f"tracking.experiment = {name!r} was deleted in MLflow: restore it or name another"
            )
        return str(found.experiment_id)

    def ui_page(self, run_id: str) -> str:
        """Address of a run in the UI, once that is running."""
        host = redact(self.uri).rstrip("/") if self._is_remote else _UI_ADDRESS
        return f"{host}/#/experiments/{self.experiment_id}/runs/{run_id}?{_UI_VIEW}"

    @property
    def ui_table(self) -> str:
        """Address of the experiment's runs with the columns that say which passes and how large."""
        host = redact(self.uri).rstrip("/") if self._is_remote else _UI_ADDRESS
        where = f"{host}/#/experiments/{self.experiment_id}/runs"
        return f"{where}?{_UI_VIEW}&{TABLE}"

    @property
    def ui_command(self) -> str | None:
        """What starts the UI; None where a server already shows it."""
        if self._is_remote:
            return None
        allow = "MLFLOW_ALLOW_FILE_STORE=true " if scheme(self.uri) in ("", "file") else ""
        return f"{allow}mlflow ui --backend-store-uri {shlex.quote(redact(self.uri))}"

    @property
    def _is_remote(self) -> bool:
        return scheme(self.uri) in ("http", "https")

    def create_run(self, name: str, tags: Mapping[str, str]) -> str:
        """Id of a new RUNNING run."""
        with self._reaching():
            run = self._client.create_run(self.experiment_id, run_name=name, tags=dict(tags))
            return str(run.info.run_id)

    def terminate(self, run_id: str, status: str) -> None:
        with self._reaching():
            self._client.set_terminated(run_id, status)

    def is_running(self, run_id: str) -> bool:
        with self._reaching():
            return bool(self._client.get_run(run_id).info.status == "RUNNING")

    def rename(self, run_id: str, name: str) -> None:
        with self._reaching():
            self._client.update_run(run_id, name=name)

    def log(self, run_id: str, batch: Batch) -> None:
        """Metrics, params and tags, in few calls."""
        numbers = [
            Metric(valid_name(f.name), float(f.value), f.milliseconds, f.step, model_id=f.model_id)
            for f in batch.figures
        ]
        texts = [Param(valid_name(key), value) for key, value in batch.params.items()]
        labels = [RunTag(valid_name(key), value) for key, value in batch.tags.items()]
        with self._reaching():
            while numbers or texts or labels:
                self._client.log_batch(
                    run_id, numbers[:_METRIC_BATCH], texts[:_BATCH], labels[:_BATCH]
                )
                del numbers[:_METRIC_BATCH], texts[:_BATCH], labels[:_BATCH]

    def text(self, run_id: str, text: str, file: str) -> None:
        with self._reaching():
            self._client.log_text(run_id, text, file)

    def artifact(self, run_id: str, path: Path) -> None:
        """Upload a file, or a directory under its own name."""
        with self._reaching():
            if path.is_dir():
                self._client.log_artifacts(run_id, str(path), artifact_path=path.name)
            else:
                self._client.log_artifact(run_id, str(path))

    def dataset(self, run_id: str, name: str, source: str, digest: str, rows: int) -> None:
        """Note a dataset as input of a run."""
        entry = Dataset(
            name=name,
            digest=digest[:_DATASET_DIGEST_LENGTH],
            source_type="local" if urlsplit(source).scheme in ("", "file") else "http",
            source=json.dumps({"uri" if "://" not in source else "url": source}),
            profile=json.dumps({"num_rows": rows}),
        )
        inputs = [DatasetInput(entry, [InputTag("digest", digest), InputTag("pack", name)])]
        with self._reaching():
            try:
                self._client.log_inputs(run_id, inputs)
            except MlflowException:
                # MLflow looks for the dataset before it inserts it: another run may do so between
                self._client.log_inputs(run_id, inputs)

    def model(
        self,
        run_id: str,
        name: str,
        tags: Mapping[str, str],
        params: Mapping[str, str],
        files: Sequence[Path],
    ) -> str:
        """Id of the logged model of this experiment with this `digest` and `role`, made if new."""
        key = (self.uri, self.experiment_id, frozenset(tags.items()))
        if key in _MODELS:
            return _MODELS[key]
        with self._reaching():
            found = self._logged(tags)
            if found is None:
                made: LoggedModel = self._client.create_logged_model(
                    self.experiment_id,
                    name=re.sub(r"[/:.%\"']", "-", name),
                    source_run_id=run_id,
                    tags=dict(tags),
                    params={valid_name(key): value for key, value in params.items()},
                    model_type="checkpoint",
                )
                found = str(made.model_id)
                for file in files:
                    self._client.log_model_artifact(found, str(file))
                self._client.finalize_logged_model(found, LoggedModelStatus.READY)
        _MODELS[key] = found
        return found

    def _logged(self, tags: Mapping[str, str]) -> str | None:
        """Of any run, with these tags from now on."""
        known = self._client.search_logged_models(
            [self.experiment_id],
            filter_string=f"tags.digest = '{tags['digest']}' AND tags.role = '{tags['role']}'",
            order_by=[{"field_name": "creation_timestamp", "ascending": True}],
        )
        for model in known:
            if model.status == LoggedModelStatus.READY:
                if not tags.items() <= model.tags.items():  # setting them is slow
                    self._client.set_logged_model_tags(model.model_id, dict(tags))
                return str(model.model_id)
        return None

    def register(
        self, name: str, model_id: str, run_id: str, evidence: Mapping[str, str], alias: str
    ) -> str:
        """The version of a registered model that a logged model is, made if new; with the alias."""
        labels = {valid_name(key): value for key, value in evidence.items()}
        with self._reaching():
            return version_of(self._client, (name, model_id, run_id), labels, alias)

    def model_input(self, run_id: str, model_id: str) -> None:
        with self._reaching():
            self._client.log_inputs(run_id, models=[LoggedModelInput(model_id)])

    def model_output(self, run_id: str, model_id: str) -> None:
        with self._reaching():
            self._client.log_outputs(run_id, [LoggedModelOutput(model_id, step=0)])

    def running(self, tag: str, value: str) -> list[tuple[str, dict[str, str]]]:
        """Id and tags of the RUNNING runs of the experiment that carry a tag."""
        runs: list[Run] = []
        token: str | None = None
        with self._reaching():
            while True:
                page = self._client.search_runs(
                    [self.experiment_id],
                    f"attributes.status = 'RUNNING' AND tags.`{tag}` = '{value}'",
                    max_results=_PAGE,
                    page_token=token,
                )
                runs += page
                if not page.token:
                    break
                token = page.token
        return [(run.info.run_id, dict(run.data.tags)) for run in runs]

    @contextmanager
    def sampling(self, run_id: str) -> Iterator[None]:
        """CPU, memory, disk, network and GPU of this machine as metrics `system/...` meanwhile."""
        monitor = SystemMetricsMonitor(run_id, tracking_uri=self.uri)
        monitor.start()
        try:
            yield
        finally:
            monitor.finish()

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except FAILURES as error:
            where = redact(self.uri)
            raise TrackingError(f"MLflow at {where} failed: {one_line(error)}") from error


def valid_name(name: str) -> str:
    """A name that MLflow takes for metrics, params and tags; different names stay different."""
    valid = re.sub(r"[^\w.\-:/ ]", "_", name)
    valid = "/".join(part for part in valid.split("/") if part not in ("", ".", ".."))
    if valid == name and len(name) <= _NAME_LENGTH:
        return name
    return f"{valid[: _NAME_LENGTH - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
