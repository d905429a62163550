"""What MLflow's UI shows of runs: columns, and versions of a registered model."""

from __future__ import annotations

import json

import pytest
from mlflow import MlflowClient
from safetensors.torch import load_file
from support.runs import Done, World

pytest_plugins = ("support.worlds",)


@pytest.fixture(scope="module")
def passed(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[World, Done]:
    """A run whose checkpoint passes: every expert kept."""
    own = world.elsewhere(tmp_path_factory.mktemp("shown"))
    done = own.run("task=noop", "tracking.register_as=small model", "tracking.alias=champion")
    assert done.code == 0, done.out + done.err
    return own, done


def test_what_passes_becomes_a_version_with_its_evidence_if_asked_for(
    passed: tuple[World, Done],
) -> None:
    """In MLflow's registry; a second run of the same checkpoint is the same version."""
    own, done = passed
    client = MlflowClient(tracking_uri=own.uri)
    asked = ("tracking.register_as=small model", "tracking.alias=champion")
    again = own.run("task=noop", *asked)
    assert again.code == 0, again.out + again.err
    (version,) = client.search_model_versions("name = 'small model'")
    assert client.get_model_version_by_alias("small model", "champion").version == version.version
    logged = client.get_logged_model(version.tags["model_id"])
    assert logged.tags["digest"] == done.result["checkpoint"]["digest"]
    assert logged.tags["role"] == "pruned"
    assert version.tags["gate.status"] == "PASS"
    assert float(version.tags["summary/dppl_percent"]) == 0
    tags = client.get_run(again.result["mlflow_run_id"]).data.tags
    assert tags["registered"] == f"small model version {version.version}"


def test_the_shared_view_has_the_columns_of_runs(passed: tuple[World, Done]) -> None:
    """As the UI's Share button saves it; every column is something that a run has."""
    own, done = passed
    (address,) = [line.split()[-1] for line in done.out.splitlines() if "viewState" in line]
    key = address.partition("viewStateShareKey=")[2]
    client = MlflowClient(tracking_uri=own.uri)
    run = client.get_run(done.result["mlflow_run_id"])
    experiment = client.get_experiment(run.info.experiment_id)
    view = json.loads(experiment.tags[f"mlflow.sharedViewState.{key}"])
    has = {"metrics": run.data.metrics, "params": run.data.params, "tags": run.data.tags}
    for column in view["selectedColumns"]:
        kind, _, name = column.partition(".")
        assert name.strip("`") in has[kind], column


def test_the_shared_charts_draw_what_runs_have(passed: tuple[World, Done]) -> None:
    own, done = passed
    client = MlflowClient(tracking_uri=own.uri)
    run = client.get_run(done.result["mlflow_run_id"])
    tags = client.get_experiment(run.info.experiment_id).tags
    view = json.loads(tags["mlflow.sharedViewState.charts"])
    scatter, parallel = view["compareRunCharts"]
    drawn = [scatter["xaxis"]["key"], scatter["yaxis"]["key"], *parallel["selectedMetrics"]]
    drawn.append(view["orderByKey"].removeprefix("metrics.").strip("`"))
    assert set(drawn) <= set(run.data.metrics)
    assert set(parallel["selectedParams"]) <= set(run.data.params)
    (section,) = view["compareRunSections"]
    assert {chart["metricSectionId"] for chart in view["compareRunCharts"]} == {section["uuid"]}


def test_gigabytes_are_of_the_weights(passed: tuple[World, Done]) -> None:
    """Of every expert kept they are the base's; the tokenizer beside them is not pruned."""
    own, done = passed
    client = MlflowClient(tracking_uri=own.uri)
    metrics = client.get_run(done.result["mlflow_run_id"]).data.metrics
    shards = own.model.glob("*.safetensors")
    size = sum(tensor.nbytes for shard in shards for tensor in load_file(shard).values())
    assert metrics["summary/gb"] == metrics["summary/gb_base"] == size / 1e9
