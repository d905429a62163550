"""What MLflow's UI shows first: a view of the runs, and versions of a registered model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mlflow.exceptions import MlflowException

if TYPE_CHECKING:
    from mlflow import MlflowClient

_TAG = "mlflow.sharedViewState"  # of an experiment, as the UI's Share button sets it
TABLE = "viewStateShareKey=verdicts"  # in an address
COLUMNS = (  # the UI shows metrics first, then params, then tags
    "metrics.`summary/keep_n`",
    "metrics.`summary/gb`",
    "metrics.`summary/dppl_percent`",
    "metrics.`telemetry/tokens_per_s/evaluate`",
    "params.`pruning.name`",
    "tags.`gate.status`",
    "tags.`gate.failed_checks`",
)
AXES = ("summary/keep_n", "summary/gb", "summary/tokens", "summary/dppl_percent")
_SECTION = "eaft_prune"


def _chart(name: str, kind: str, **values: Any) -> dict[str, Any]:
    shared = {"runsCountToCompare": 100, "deleted": False, "isGenerated": False}
    return {"uuid": name, "type": kind, "metricSectionId": _SECTION, **shared, **values}


VIEWS = {
    "verdicts": {"selectedColumns": COLUMNS},
    # by size, because only runs in order of time are folded under their parents and not drawn
    "charts": {
        "orderByKey": "metrics.`summary/gb`",
        "orderByAsc": True,
        "isAccordionReordered": True,
        "compareRunSections": [
            {
                "uuid": _SECTION,
                "name": "How small, at what loss",
                "display": True,
                "isReordered": True,
                "isGenerated": False,
                "deleted": False,
                "columns": 2,
                "cardHeight": 420,
            }
        ],
        "compareRunCharts": [
            _chart(
                "size",
                "SCATTER",
                xaxis={"key": "summary/gb", "type": "METRIC"},
                yaxis={"key": "summary/dppl_percent", "type": "METRIC"},
            ),
            _chart(
                "size, tokens, loss",
                "PARALLEL",
                selectedParams=["pruning.name"],
                selectedMetrics=AXES,
                showAllRuns=True,
            ),
        ],
    },
}


def share_views(client: MlflowClient, experiment_id: str) -> None:
    """Save the views that answer which runs pass, how large, how good and how fast they are."""
    tags = client.get_experiment(experiment_id).tags
    for key, view in VIEWS.items():
        text = json.dumps(view)
        if tags.get(f"{_TAG}.{key}") != text:
            client.set_experiment_tag(experiment_id, f"{_TAG}.{key}", text)


def version_of(
    client: MlflowClient, model: tuple[str, str, str], labels: Mapping[str, str], alias: str
) -> str:
    """The version that a logged model is of a registered one, made if new, with alias and tags.

    model: the registered model's name, the logged model's id, the run that it passed in.
    """
    name, model_id, run_id = model
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    quoted = name.replace("'", "''")
    known = client.search_model_versions(f"name = '{quoted}'")
    # not models:/ID, which MLflow looks up on the server of its own global settings
    source = client.get_logged_model(model_id).artifact_location
    found = next((one for one in known if one.source == source), None)
    if found is None:
        found = client.create_model_version(name, source, run_id, model_id=model_id)
    for key, value in {**labels, "model_id": model_id}.items():
        client.set_model_version_tag(name, found.version, key, value)
    client.set_registered_model_alias(name, alias, found.version)
    return str(found.version)
