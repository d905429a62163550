"""MLflow, for real: databases in tmp_path, subprocesses for signals, nothing mocked."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from mlflow import MlflowClient
from mlflow.entities import Run
from support.forks import Fork, fork

from eaft_prune import tracking
from eaft_prune.config import Experiment, TrackingSettings
from eaft_prune.core import provenance
from eaft_prune.core.outcome import StageRecord
from eaft_prune.core.types import Checkpoint, KeepPlan, UserError
from eaft_prune.core.verdict import GateCheck, GateVerdict, PackReport
from eaft_prune.pipeline.observer import Observer
from eaft_prune.tracking.history import Archive
from eaft_prune.tracking.server import valid_name

pytestmark = pytest.mark.process

KEYS = [(pack, seq_len) for pack in ("a", "b", "UNION") for seq_len in (1024, 2048)]
VERSIONS = {"torch": "2.13.0", "mlflow": "3.17.2"}


@pytest.fixture(scope="session")
def schema(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with MLflow's tables and nothing of ours: creating one takes seconds."""
    database = tmp_path_factory.mktemp("schema") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{database}")
    return database


@pytest.fixture
def uri(schema: Path, tmp_path: Path) -> str:
    database = tmp_path / "mlruns" / "mlflow.db"
    database.parent.mkdir()
    shutil.copyfile(schema, database)
    return f"sqlite:///{database}"


def settings(uri: str, **values: Any) -> Experiment:
    tracked = {
        "uri": uri,
        "experiment": "tests",
        "system_metrics": False,
        **values.pop("tracking", {}),
    }
    return Experiment.model_validate(
        {
            "task": {"name": "pipeline"},
            "model": {"name": "tiny", "path": "demo:"},
            "packs": {"name": "two", "files": {"a": "a.parquet", "b": "b.parquet"}},
            "profile": {"num_blocks": 4, "seq_len": 64, "seed": 0},
            "pruning": {
                "name": "reap",
                "keep_n": 24,
                "saliency": "gate_norm",
                "weight": "uniform",
                "reduce": "mean",
            },
            "export": {},
            "eval": {"name": "two", "seq_lens": (1024, 2048), "num_blocks": 4, "seed": 3},
            "gate": {
                "name": "near_lossless_v1",
                "seq_lens": (1024, 2048),
                "max_dppl": 0.25,
                "max_dppl_relative": 0.05,
                "max_dcc_rate": 0.002,
                "max_dmean_prob": 0.02,
                "max_js2d": 0.02,
            },
            "engine": {"name": "transformers"},
            "tracking": tracked,
            "runtime": {"batch_tokens": 64, "store_dir": "store", "checkpoint_dir": "out"},
            **values,
        }
    )


def report(ppl: float) -> PackReport:
    return PackReport(
        ppl=ppl,
        mean_prob=0.1 * ppl,
        mean_entropy=0.3,
        cc_rate=0.02,
        cc_rate_base_thr=0.021,
        js2d=0.01,
        js2d_corrected=0.009,
        rows=300,
        scored_tokens=1000,
        blocks=4,
    )


def stage(name: str, **values: Any) -> StageRecord:
    facts = values.pop("facts", {"tokens": 1000, "device": "cpu"})
    record: dict[str, Any] = {"key": "k" * 64, "cached": False, "seconds": 1.5} | values
    return StageRecord(
        stage=name, path=Path("store") / name, output_digest="o" * 64, facts=facts, **record
    )


def checkpoints(directory: Path) -> tuple[Checkpoint, Checkpoint]:
    pruned = directory / "pruned"
    pruned.mkdir(parents=True)
    (pruned / "manifest.json").write_text("{}")
    (pruned / "expert_mapping.json").write_text("{}")
    (pruned / "model.safetensors").write_bytes(b"weights")
    return (
        Checkpoint(directory / "base", "b" * 64, "tiny/base:1"),
        Checkpoint(pruned, "c" * 64, "tiny-keep24"),
    )


def run_pipeline(run: Observer, directory: Path) -> None:
    """Every call that a real pipeline makes."""
    base, pruned = checkpoints(directory)
    run.dataset("a", "packs/a.parquet", "a" * 64, 800)
    run.dataset("b", "https://example.org/b.parquet", "d" * 64, 900)
    run.checkpoint("base", base, None)
    run.stage(stage("profile", facts={"tokens": 1000, "tokens_per_s": 12.5}))
    run.plan(KeepPlan(((0, 1, 2), (1, 3)), n_experts=4))
    run.checkpoint("pruned", pruned, base, {"criterion": "reap", "pruning": {"keep_n": 2}})
    for pack, seq_len in KEYS:
        run.stage(stage(f"pack/{pack}/{seq_len}", cached=True, seconds=0.0))
    base_reports = {key: report(5.0) for key in KEYS}
    run.reports("base", base_reports, None)
    run.reports("pruned", {key: report(5.1) for key in KEYS}, base_reports)
    run.reports("masked", {key: report(5.2) for key in KEYS}, base_reports)
    checks = (
        GateCheck("dppl", "UNION", 1024, 0.1, 0.25, True),
        GateCheck("js2d", "UNION", 1024, 0.03, 0.02, False, estimate=0.025),
        GateCheck("js2d", "UNION", 2048, 0.04, 0.02, False),
    )
    run.verdict(GateVerdict("near_lossless_v1", "FAIL", checks))
    run.facts({"max_error": 0.5, "identical": True, "by_layer": {"0": 1}, "engine": "eager"})
    (directory / "report.html").write_text("<p>report</p>")
    run.artifact(directory / "report.html")
    run.artifact(pruned.path)


def only_run(uri: str) -> Run:
    client = MlflowClient(tracking_uri=uri)
    found = client.get_experiment_by_name("tests")
    assert found is not None
    (run,) = client.search_runs([found.experiment_id])
    return client.get_run(run.info.run_id)


def artifacts(uri: str, run_id: str) -> Path:
    """Where a run's artifacts lie, read from the run itself."""
    location = MlflowClient(tracking_uri=uri).get_run(run_id).info.artifact_uri
    assert location.startswith("file:///")
    return Path(location.removeprefix("file://"))


def test_a_pipeline_reads_back(uri: str, tmp_path: Path) -> None:
    overrides = ["pruning.keep_n=24", "tracking.parent_run_id=abc"]
    with tracking.track(settings(uri), tmp_path, overrides, VERSIONS, "a name") as run:
        run_pipeline(run, tmp_path / "work")
    client = MlflowClient(tracking_uri=uri)
    found = only_run(uri)
    metrics, tags, params = found.data.metrics, found.data.tags, found.data.params

    assert found.info.status == "FINISHED"
    assert found.info.run_name == "FAIL +2.0% a name"
    assert params["pruning.keep_n"] == "24"
    assert params["packs.files.b"] == "b.parquet"
    assert params["eval.seq_lens"] == "[1024, 2048]"
    assert params["packs.revision"] == "null"
    assert tags["mlflow.source.name"].startswith("python -m eaft_prune pruning.keep_n=24")
    assert tags["version.torch"] == "2.13.0"
    assert tags["run_dir"] == str(tmp_path)

    assert metrics["telemetry/tokens_per_s/profile"] == 12.5
    assert metrics["telemetry/seconds/profile"] == 1.5
    assert metrics["telemetry/stages"] == 1 + len(KEYS)
    assert metrics["telemetry/stages_cached"] == len(KEYS)
    assert tags["stage.pack/UNION/1024"] == "k" * 64
    assert (metrics["summary/keep_n"], metrics["summary/n_experts"]) == (2.5, 4)
    # base and candidate share names; what a list of runs shows is the candidate's
    assert metrics["tables/UNION/1024/ppl"] == 5.1
    history = client.get_metric_history(run.run_id, "tables/UNION/1024/ppl")
    assert [point.value for point in history] == [5.0, 5.1]
    assert metrics["tables/masked/b/2048/ppl"] == 5.2
    assert metrics["tables/a/1024/dppl_percent"] == pytest.approx(2)
    assert metrics["verdict/dppl/UNION/1024/limit"] == 0.25
    assert metrics["verdict/js2d/UNION/2048/value"] == 0.04
    assert metrics["summary/gate_pass"] == 0
    assert metrics["summary/gate_margin"] == pytest.approx(-1)  # js2d of twice its limit
    assert metrics["summary/dppl_percent"] == pytest.approx(2)
    assert (metrics["summary/ppl_base"], metrics["summary/ppl"]) == (5.0, 5.1)
    assert metrics["summary/js2d"] == 0.04
    assert metrics["values/by_layer/0"] == 1
    assert metrics["values/max_error"] == 0.5
    assert (tags["identical"], tags["engine"]) == ("true", "eager")
    assert {name.split("/")[0] for name in metrics} == {
        "summary", "tables", "telemetry", "values", "verdict"
    }  # fmt: skip
    assert tags["gate.status"] == "FAIL"
    assert tags["gate.failed_checks"] == "js2d@UNION/1024,js2d@UNION/2048"
    note = tags["mlflow.note.content"]
    assert "| js2d | UNION | 1024 | +0.02500 |" in note  # the number that decides
    assert "| js2d | UNION | 2048 | +0.04000 |" in note
    assert "by point estimates FAIL on js2d@UNION/1024, js2d@UNION/2048)" in note

    datasets = {item.dataset.name: item for item in found.inputs.dataset_inputs}
    assert "a" * 64 == tags["dataset.a.digest"] == datasets["a"].tags[0].value
    assert json.loads(datasets["a"].dataset.source) == {"uri": "packs/a.parquet"}
    assert json.loads(datasets["b"].dataset.profile) == {"num_rows": 900}

    base = client.get_logged_model(found.inputs.model_inputs[0].model_id)
    pruned = client.get_logged_model(found.outputs.model_outputs[0].model_id)
    assert (base.name, pruned.name) == ("tiny", "pruned")  # the directory it was written to
    assert pruned.tags["base_model_id"] == base.model_id
    assert pruned.tags["base_digest"] == base.tags["digest"] == "b" * 64
    assert pruned.params["plan.digest"] == tags["plan.digest"]
    for model, ppl in ((base, 5.0), (pruned, 5.1)):
        of = {metric.key: metric.value for metric in model.metrics or ()}
        assert of["tables/a/1024/ppl"] == ppl
    kept = Path(pruned.artifact_location.removeprefix("file://"))
    assert {path.name for path in kept.iterdir()} == {"manifest.json", "expert_mapping.json"}

    folder = artifacts(uri, run.run_id)
    assert json.loads((folder / "plan.json").read_text())["kept"] == [[0, 1, 2], [1, 3]]
    assert yaml.safe_load((folder / "config.yaml").read_text())["pruning"]["keep_n"] == 24
    assert json.loads((folder / "versions.json").read_text()) == VERSIONS
    assert json.loads((folder / "stages.json").read_text())[1]["facts"]["device"] == "cpu"
    assert (folder / "report.html").exists()
    assert (folder / "pruned" / "manifest.json").exists()
    assert run.ui_command == f"mlflow ui --backend-store-uri {uri}"
    assert f"/#/experiments/{found.info.experiment_id}/runs/{run.run_id}?" in run.ui_page


def test_stages_add_up_as_they_end(uri: str, tmp_path: Path) -> None:
    client = MlflowClient(tracking_uri=uri)
    with tracking.track(settings(uri), tmp_path, [], {}, "run") as run:
        run.stage(stage("evaluate/base/a", seconds=4.0))
        metrics = client.get_run(run.run_id).data.metrics
        assert metrics["telemetry/seconds/evaluate"] == 4  # told while the run goes on
        run.stage(stage("evaluate/base/b", seconds=0.5, cached=True))
    history = client.get_metric_history(run.run_id, "telemetry/seconds/evaluate")
    assert [(point.step, point.value) for point in history] == [(1, 4.0), (2, 4.5)]


def test_utilities_are_kept_apart(uri: str, tmp_path: Path) -> None:
    with tracking.track(settings(uri), tmp_path, [], {}, "memo", True) as run:
        pass
    client = MlflowClient(tracking_uri=uri)
    home = client.get_experiment(client.get_run(run.run_id).info.experiment_id)
    assert home.name == "tests-utilities"


@pytest.mark.dear
def test_the_machine_is_sampled(uri: str, tmp_path: Path) -> None:
    asked = settings(uri, tracking={"system_metrics": True})
    deadline = time.monotonic() + 60
    with tracking.track(asked, tmp_path, [], {}, "run"):
        while time.monotonic() < deadline:
            if "system/cpu_utilization_percentage" in only_run(uri).data.metrics:
                return
    pytest.fail("nothing was sampled in a minute")


def test_runs_share_the_models_of_equal_digests(uri: str, tmp_path: Path) -> None:
    base, pruned = checkpoints(tmp_path)
    models = []
    for _ in range(2):
        with tracking.track(settings(uri), tmp_path, [], {}, "run") as run:
            run.checkpoint("base", base, None)
            run.checkpoint("pruned", pruned, base)
        found = MlflowClient(tracking_uri=uri).get_run(run.run_id)
        models.append((found.inputs.model_inputs[0], found.outputs.model_outputs[0]))
    assert models[0] == models[1]
    assert models[0][0].model_id != models[0][1].model_id


def test_long_values_become_artifacts(uri: str, tmp_path: Path) -> None:
    long = "x/" * 4000 + "a.parquet"
    packs = {"name": "two", "files": {"a": long, "b": "b.parquet"}}
    with tracking.track(settings(uri, packs=packs), tmp_path, [], {}, "run") as run:
        run.facts({"story": long})
    found = only_run(uri)
    for value, file in (
        (found.data.params["packs.files.a"], "settings/packs.files.a.txt"),
        (found.data.tags["story"], "tags/story.txt"),
    ):
        assert re.fullmatch("sha256:[0-9a-f]{64}", value)
        assert (artifacts(uri, run.run_id) / file).read_text() == long


def test_passwords_stay_out_of_what_is_kept(uri: str, tmp_path: Path) -> None:
    password = uuid.uuid4().hex
    url = f"https://me:{password}@host/a.parquet"
    packs = {"name": "two", "files": {"a": url, "b": "b.parquet"}}

    def work() -> None:
        with tracking.track(
            settings(uri, packs=packs), tmp_path, [f"packs.files.a={url}"], {}, "run"
        ) as run:
            run.dataset("a", url, "a" * 64, 8)
            run.facts({"source": url})
            run.stage(stage("pack", facts={"source": url}))
            raise ValueError(f"{url} is not there")

    with pytest.raises(ValueError, match=password):
        work()
    found = only_run(uri)
    files = artifacts(uri, found.info.run_id).rglob("*.*")
    kept = [str(found.to_dictionary()), *(path.read_text() for path in files)]
    assert len(kept) > 4
    assert not [text for text in kept if password in text]


def test_redaction_leaves_other_urls_alone() -> None:
    uri = "postgresql://me:secret@db:5432/mlflow"
    assert provenance.redact(f"see {uri}!") == "see postgresql://***@db:5432/mlflow!"
    assert provenance.redact("http://host:5000/a@b") == "http://host:5000/a@b"


def test_git_state_of_a_changed_tree(tmp_path: Path) -> None:
    git = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@example.org"]
    file = tmp_path / "code.py"
    file.write_text("a = 1\n")
    assert provenance.git_state(file) is None
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "one"]):
        subprocess.run(git + command, check=True)
    clean = provenance.git_state(file)
    assert clean is not None
    assert clean.tags["mlflow.source.git.dirty"] == "false"
    file.write_text("a = 2\n")
    changed = provenance.git_state(file)
    assert changed is not None
    assert changed.commit == clean.commit
    assert changed.tags["mlflow.source.git.dirty"] == "true"
    assert "+a = 2" in changed.diff


def test_no_git_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.git_state(Path(provenance.__file__)) is None


def test_an_exception_is_failed(uri: str, tmp_path: Path) -> None:
    def work() -> None:
        with tracking.track(settings(uri), tmp_path, [], {}, "run") as run:
            run.stage(stage("profile"))
            raise ValueError("shard 2 is truncated\nsecond line")

    with pytest.raises(ValueError, match="truncated"):
        work()
    found = only_run(uri)
    assert found.info.status == "FAILED"
    assert found.data.tags["error"] == "ValueError: shard 2 is truncated"
    folder = artifacts(uri, found.info.run_id)
    assert "raise ValueError" in (folder / "traceback.txt").read_text()
    assert (folder / "stages.json").exists()


@pytest.mark.parametrize("code", [0, None, 3])
def test_a_run_that_ends_by_sys_exit_is_failed(uri: str, tmp_path: Path, code: int | None) -> None:
    with pytest.raises(SystemExit), tracking.track(settings(uri), tmp_path, [], {}, "run"):
        sys.exit(code)
    assert only_run(uri).info.status == "FAILED"


@pytest.mark.parametrize("when", ["before", "after"])
def test_what_was_being_sent_when_a_signal_came_is_kept(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """Ctrl-C within MLflow's own call, before it has written anything and after."""
    send, calls = MlflowClient.log_batch, []

    def interrupted(self: MlflowClient, run_id: str, *what: Any, **how: Any) -> Any:
        first = any(tag.key == "first" for part in what for tag in part if hasattr(tag, "key"))
        calls.append(first)
        if first and calls.count(True) == 1:
            if when == "after":
                send(self, run_id, *what, **how)
            raise KeyboardInterrupt
        return send(self, run_id, *what, **how)

    monkeypatch.setattr(MlflowClient, "log_batch", interrupted)

    def work() -> None:
        with tracking.track(settings(uri), tmp_path, [], VERSIONS, "x") as run:
            run.facts({"first": "a", "size": 2.5})
            run.flush()

    with pytest.raises(KeyboardInterrupt):
        work()
    found = only_run(uri)
    assert found.info.status == "KILLED"
    assert found.data.tags["first"] == "a"
    assert found.data.metrics["values/size"] == 2.5
    assert calls.count(True) == 2


def child(uri: str, body: Callable[[tracking.MlflowRun], object], directory: Path) -> Fork:
    """A process in `directory` that tracks a run and does `body` in it."""

    def work() -> int:
        with tracking.track(settings(uri), Path("."), [], {}, "run") as run:
            body(run)
        return 0

    return fork(work, directory)


def wait(run: tracking.MlflowRun) -> None:
    print(run.run_id)
    signal.pause()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_are_killed(uri: str, tmp_path: Path, number: signal.Signals) -> None:
    process = child(uri, wait, tmp_path)
    process.reach("")
    process.send(number)
    assert process.wait() != 0
    found = only_run(uri)
    assert found.info.status == "KILLED"
    assert found.data.tags["killed.reason"] == number.name
    assert ("KeyboardInterrupt" if number == signal.SIGINT else "Terminated") in process.text


def test_under_nohup_a_closed_terminal_ends_nothing(uri: str, tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with tracking.track(settings(uri), tmp_path, [], {}, "run"):
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert only_run(uri).info.status == "FINISHED"


def test_an_empty_file_is_no_database_and_is_replaced_by_a_whole_one(tmp_path: Path) -> None:
    database = tmp_path / "mlflow.db"
    database.touch()
    empty = database.stat().st_ino
    uri = f"sqlite:///{database}"
    with pytest.raises(UserError, match="no run was tracked"):
        Archive(uri).runs()
    assert database.stat().st_size == 0  # who reads creates nothing
    with tracking.track(settings(uri), tmp_path, [], {}, "run"):
        pass
    assert database.stat().st_ino != empty  # a rename, not half a schema in place
    assert only_run(uri).info.status == "FINISHED"


@pytest.mark.parametrize("size", [50_000, 400_000])
def test_a_disk_that_fills_up_leaves_no_database(size: int, tmp_path: Path) -> None:
    """No file may grow beyond so many bytes."""
    database = tmp_path / "mlflow.db"

    def work() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        try:
            tracking.prepare(settings(f"sqlite:///{database}").tracking)
        except UserError as error:
            print(f"error: {error}")
            return 2
        return 0

    process = fork(work, tmp_path)
    assert process.wait() == 2, process.text
    assert "error: tracking.uri = " in process.text.splitlines()[-1]
    assert "Traceback" not in process.text
    assert [path.name for path in tmp_path.iterdir()] == ["mlflow.db.lock"]


def test_sigterm_handler_is_restored_and_finally_blocks_run(uri: str, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    cleaned = []

    def work() -> None:
        with tracking.track(settings(uri), tmp_path, [], {}, "run"):
            try:
                signal.raise_signal(signal.SIGTERM)
            finally:
                cleaned.append(True)

    with pytest.raises(tracking.Terminated):
        work()
    assert cleaned
    assert signal.getsignal(signal.SIGTERM) is before
    assert only_run(uri).info.status == "KILLED"


def test_threads_track_without_signals(uri: str, tmp_path: Path) -> None:
    def work() -> None:
        with tracking.track(settings(uri), tmp_path, [], {}, "run") as run:
            run.stage(stage("profile"))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    client = MlflowClient(tracking_uri=uri)
    found = client.get_experiment_by_name("tests")
    assert found is not None
    runs = client.search_runs([found.experiment_id])
    assert [run.info.status for run in runs] == ["FINISHED"] * 3
    assert all(run.data.metrics["telemetry/seconds/profile"] == 1.5 for run in runs)


def test_stale_runs_are_closed_and_others_left_alone(uri: str, tmp_path: Path) -> None:
    process = child(uri, wait, tmp_path)
    process.reach("")
    stale = process.text.strip()
    assert process.kill()
    client = MlflowClient(tracking_uri=uri)
    assert client.get_run(stale).info.status == "RUNNING"
    dead = {key: client.get_run(stale).data.tags[key] for key in provenance.process_tags()}
    started = float(provenance.process_tags()["process.started"])
    cases: dict[str, tuple[dict[str, str], str]] = {
        "live": (provenance.process_tags(), "RUNNING"),
        "other host": ({**dead, "process.host": "elsewhere"}, "RUNNING"),
        "other namespace": ({**dead, "process.namespace": "pid:[1]"}, "RUNNING"),
        "untagged": ({}, "RUNNING"),
        "pid reused": (
            {**provenance.process_tags(), "process.started": f"{started - 60:.2f}"},
            "KILLED",
        ),
    }
    experiment_id = client.get_run(stale).info.experiment_id
    ids = {name: client.create_run(experiment_id, tags=cases[name][0]) for name in cases}

    server = tracking.prepare(settings(uri).tracking)
    assert set(tracking.close_stale_runs(server)) == {stale, ids["pid reused"].info.run_id}
    assert client.get_run(stale).info.status == "KILLED"
    assert "is gone" in client.get_run(stale).data.tags["killed.reason"]
    for name, run in ids.items():
        assert client.get_run(run.info.run_id).info.status == cases[name][1], name


def test_a_zombie_is_dead() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    started = psutil.Process(process.pid).create_time()
    tags = {
        **provenance.process_tags(),
        "process.pid": str(process.pid),
        "process.started": str(started),
    }
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # ended, not yet collected
    assert provenance.is_dead(tags)
    process.wait()


@pytest.mark.slow
def test_six_processes_start_on_a_fresh_database(tmp_path: Path) -> None:
    uri = "sqlite:///new/dir/mlflow.db"
    processes = [child(uri, lambda run: run.facts({"x": 1}), tmp_path) for _ in range(6)]
    for process in processes:
        assert process.wait() == 0, process.text
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/new/dir/mlflow.db")
    found = client.get_experiment_by_name("tests")
    assert found is not None
    runs = client.search_runs([found.experiment_id])
    assert [run.info.status for run in runs] == ["FINISHED"] * 6
    assert found.artifact_location == (tmp_path / "new/dir/artifacts").as_uri()


def test_a_run_that_ends_while_it_is_looked_at_keeps_its_status(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Listed as RUNNING, it ends before its process is looked for, and its process with it."""
    process = child(uri, wait, tmp_path)
    process.reach("")
    run_id = process.text.strip()
    assert process.kill()
    client = MlflowClient(tracking_uri=uri)
    find = psutil.Process

    def ended(pid: int) -> psutil.Process:
        client.set_terminated(run_id, "FINISHED")
        return find(pid)

    server = tracking.prepare(settings(uri).tracking)
    monkeypatch.setattr(psutil, "Process", ended)
    assert tracking.close_stale_runs(server) == []
    assert client.get_run(run_id).info.status == "FINISHED"


def test_relative_paths_resolve_against_the_working_directory(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    server = tracking.prepare(TrackingSettings(uri="sqlite:///mlruns/mlflow.db", experiment="x"))
    assert server.uri == uri


def test_a_directory_still_works(tmp_path: Path) -> None:
    uri = f"file:{tmp_path}/runs"
    with tracking.track(settings(uri), tmp_path, [], {}, "run") as run:
        run_pipeline(run, tmp_path / "work")
    client = MlflowClient(tracking_uri=(tmp_path / "runs").as_uri())
    found = client.get_run(run.run_id)
    assert found.info.status == "FINISHED"
    assert found.data.tags["gate.status"] == "FAIL"


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


BAD_URIS: dict[str, tuple[Callable[[Path, int], str], str]] = {
    "refused": (lambda _, port: f"http://127.0.0.1:{port}", "Connection refused"),
    "no host": (lambda *_: "http://", "names no host"),
    "no such scheme": (lambda *_: "htp://server", "htp"),
    "in memory": (lambda *_: "sqlite://", "names no file"),
    "empty": (lambda *_: "", "is empty"),
    "bad port": (lambda *_: "postgresql://u:secret@h:port/x", "'port'"),
    "a file above": (lambda path, _: f"sqlite:///{path}/junk/mlflow.db", "File exists"),
    "no database": (lambda path, _: f"sqlite:///{path}/junk", "file is not a database"),
}


@pytest.mark.parametrize("case", BAD_URIS)
def test_a_bad_uri_is_one_clear_line(case: str, tmp_path: Path, closed_port: int) -> None:
    (tmp_path / "junk").write_text("this is no database, " * 50)
    make, reason = BAD_URIS[case]
    uri = make(tmp_path, closed_port)
    with pytest.raises(UserError) as caught:
        tracking.prepare(TrackingSettings(uri=uri, experiment="tests"))
    message = str(caught.value)
    assert message.startswith(f"tracking.uri = {provenance.redact(uri)!r} ")
    assert reason in message
    assert "secret" not in message
    assert "\n" not in message


def test_a_deleted_experiment_is_named(uri: str) -> None:
    server = tracking.prepare(settings(uri).tracking)
    MlflowClient(tracking_uri=uri).delete_experiment(server.experiment_id)
    with pytest.raises(UserError, match=r"tracking\.experiment = 'tests' was deleted"):
        tracking.prepare(settings(uri).tracking)


def test_a_tracker_that_breaks_midway_is_an_error(uri: str, tmp_path: Path) -> None:
    def work() -> None:
        with tracking.track(settings(uri), tmp_path, [], {}, "run") as run:
            Path(uri.removeprefix("sqlite:///")).write_bytes(b"")
            run.stage(stage("profile"))

    with pytest.raises(tracking.TrackingError, match="no such table") as caught:
        work()
    assert str(caught.value).startswith(f"MLflow at {uri} failed: ")
    assert any("could not be closed" in note for note in caught.value.__notes__)


def test_a_multirun_nests(uri: str, tmp_path: Path) -> None:
    parent = tracking.start_parent(settings(uri).tracking, "keep_n sweep", "eaft-prune -m")
    client = MlflowClient(tracking_uri=uri)
    assert client.get_run(parent).info.status == "RUNNING"
    point = settings(uri, tracking={"parent_run_id": parent, "run_name": "point 0"})
    with tracking.track(point, tmp_path, [], {}, "run") as run:
        pass
    assert client.get_run(run.run_id).data.tags["mlflow.parentRunId"] == parent
    assert client.get_run(run.run_id).info.run_name == "point 0"
    table, text = tmp_path / "summary.csv", tmp_path / "summary.md"
    table.write_text("keep_n,ppl\n24,5.1\n")
    text.write_text("| keep_n | ppl |\n")
    tracking.finish_parent(
        settings(uri).tracking, parent, "FAILED", [table, text], {"summary/plans": 1}
    )
    found = client.get_run(parent)
    assert found.info.status == "FAILED"
    assert found.data.metrics == {"summary/plans": 1}
    assert found.data.tags["mlflow.note.content"] == "| keep_n | ppl |\n"
    assert (artifacts(uri, parent) / "summary.csv").exists()


def test_importing_is_quick() -> None:
    code = "import sys, eaft_prune.tracking; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@given(st.text(min_size=1, max_size=300), st.text(min_size=1, max_size=300))
def test_names_are_valid_and_stay_apart(one: str, other: str) -> None:
    from mlflow.utils.validation import _validate_metric_name

    name = valid_name(one)
    _validate_metric_name(name)
    assert 0 < len(name) <= 250
    assert valid_name(name) == name
    assert (name == valid_name(other)) == (one == other)
