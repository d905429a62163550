"""Multiruns: plan_only, launchers, the parent run's summary, failing and interrupted points."""

from __future__ import annotations

import csv
import importlib.util
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient
from support.runs import Done, World

pytest_plugins = ("support.worlds",)

pytestmark = pytest.mark.dear

MASKED = ("eval.candidates=[masked]", "pruning=random", "pruning.core_pos_top_m=0", "-m")
DISTINCT = (*MASKED, "pruning.seed=0,1", "pruning.w_good=1,2")  # four points, two plans


@pytest.fixture(scope="module")
def own(world: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    """The shared model and packs, a store of this module's."""
    return world.elsewhere(tmp_path_factory.mktemp("sweeps"))


@pytest.fixture(scope="module")
def before(own: World) -> Done:
    """What plan_only says while the store is empty."""
    return own.run(*DISTINCT, "sweep.plan_only=true")


@pytest.fixture(scope="module")
def grid(own: World, before: Done) -> Done:
    """The four points, run."""
    done = own.run(*DISTINCT)
    assert done.code == 0, done.out + done.err
    return done


def evaluated(result: dict[str, Any]) -> int:
    return sum(s["stage"].startswith("evaluate/") and not s["cached"] for s in result["stages"])


def announced(done: Done) -> tuple[list[str], int]:
    """The state of every point, and the number of evaluations that plan_only promises."""
    assert done.code == 0, done.out + done.err
    assert not done.results  # nothing ran
    lines = done.out.splitlines()
    head = next(line for line in lines if line.startswith("point "))
    begin, end = head.index("state"), head.index("evaluations")
    first = lines.index(head) + 2  # below the rule
    states = []
    for line in lines[first:]:
        if not line.strip():
            break
        states.append(line[begin:end].strip())
    total = next(line for line in lines if line.endswith(" evaluations to run"))
    return states, int(total.split()[-4])


def test_plan_only_announces_what_then_runs(own: World, before: Done, grid: Done) -> None:
    states, count = announced(before)
    assert states == ["new", "same plan as point 0", "new", "same plan as point 2"]
    assert sum(evaluated(result) for result in grid.results) == count == 3  # the base and two plans
    assert [evaluated(result) for result in grid.results] == [2, 0, 1, 0]
    plans = [result["plan"]["digest"] for result in grid.results]
    assert plans[0] == plans[1] != plans[2] == plans[3]
    # a new point after old ones
    more = (*MASKED, "pruning.seed=1,2", "pruning.w_good=1,2", "sweep.plan_only=true")
    states, count = announced(own.run(*more))
    assert states == ["cached", "cached", "new", "same plan as point 2"]
    assert count == 1


def test_plan_only_of_exports_and_of_other_blocks(own: World, grid: Done) -> None:
    one, plan_only = (*MASKED, "pruning.seed=0"), "sweep.plan_only=true"
    assert announced(own.run(*one, "eval.seed=5", plan_only)) == (["new"], 2)
    # the base's evaluation is there, that of the checkpoint is not
    pruned = (*one, "eval.candidates=[pruned]")
    assert announced(own.run(*pruned, plan_only)) == (["new"], 1)
    assert [evaluated(result) for result in own.run(*pruned).results] == [1]
    assert announced(own.run(*pruned, plan_only)) == (["cached"], 0)


def test_plan_only_tells_of_a_point_that_cannot_run(own: World) -> None:
    done = own.run(*MASKED, "pruning.keep_n=4,16", "sweep.plan_only=true")
    assert done.code == 2
    assert "error: point 1: pruning.keep_n = 16" in done.err
    assert "2 points, 1 distinct plans" in done.out
    done = own.run("task=noise_floor", "sweep.plan_only=true", "-m", "eval.seed=1,2")
    assert done.code == 2
    assert "sweep.plan_only looks at task=pipeline" in done.err


def summary(done: Done) -> list[dict[str, str]]:
    (path,) = [p for p in done.cwd.rglob("summary.csv") if "artifacts" not in p.parts]
    with path.open() as file:
        return list(csv.DictReader(file))


def test_the_parent_run_has_table_plot_and_counts(own: World, grid: Done) -> None:
    done = grid
    client = MlflowClient(tracking_uri=own.uri)
    children = [client.get_run(result["mlflow_run_id"]) for result in done.results]
    (parent_id,) = {child.data.tags["mlflow.parentRunId"] for child in children}
    parent = client.get_run(parent_id)
    assert parent.info.status == "FINISHED"
    assert parent.data.metrics["summary/jobs"] == 4
    assert parent.data.metrics["summary/plans"] == 2
    assert parent.data.metrics["summary/jobs_failed"] == 0
    assert parent.data.metrics["telemetry/evaluations"] == sum(evaluated(r) for r in done.results)
    statuses = [result["gate"]["status"] for result in done.results]
    assert parent.data.metrics["summary/jobs_pass"] == statuses.count("PASS")
    assert parent.data.metrics["summary/jobs_inconclusive"] == statuses.count("INCONCLUSIVE")
    names = {item.path for item in client.list_artifacts(parent_id)}
    assert {"summary.csv", "summary.md", "summary.html"} <= names
    page = Path(client.download_artifacts(parent_id, "summary.html", str(done.cwd))).read_text()
    assert "<script src=" not in page  # one file, nothing fetched
    for result, row in zip(done.results, summary(done), strict=True):
        growth = max(growths(result), key=abs)
        assert float(row["ΔPPL %"]) == pytest.approx(growth, rel=1e-9)
        assert row["ΔPPL %"] in page
        assert row["overrides"] in page  # the axis says what each point is
        assert row["plan"] in page
        assert row["verdict"] == result["gate"]["status"]
        assert row["plain"] == result["gate"]["plain_status"]
        assert row["undecided checks"] == " ".join(result["gate"]["undecided_checks"])
    assert "4 jobs, 2 distinct plans" in page
    # the last two of four repeat the first two: what seeds do is told apart from what settings do
    worst = [max(growths(result), key=abs) for result in done.results]
    assert parent.data.metrics["summary/dppl_percent_mean"] == pytest.approx(np.mean(worst))
    assert parent.data.metrics["summary/dppl_percent_sd"] == pytest.approx(np.std(worst, ddof=1))
    repeats = done.out.partition("repeats over seeds")[2].splitlines()
    for weight, of in (("1", worst[::2]), ("2", worst[1::2])):
        (line,) = [text for text in repeats if text.startswith(f"pruning.w_good={weight} ")]
        passes = statuses[int(weight) - 1 :: 2].count("PASS")
        assert line.split()[1:3] == ["2", str(passes)]
        assert float(line.split()[3]) == pytest.approx(np.mean(of), abs=0.006)
    assert str(done.cwd) in done.out.partition("summary.html")[0]
    assert f"/runs/{parent_id}" in done.out  # where all of it is shown


def growths(result: dict[str, Any]) -> list[float]:
    """Growth of the PPL in percent, at every length that the gate looks at."""
    base, pruned = (result["reports"][model]["UNION"] for model in ("base", "masked"))
    lengths = {str(c["seq_len"]) for c in result["gate"]["checks"] if c["name"] == "dppl"}
    return [100 * (pruned[s]["ppl"] / base[s]["ppl"] - 1) for s in lengths]


@pytest.mark.slow
def test_joblib_gives_what_the_basic_launcher_gives(own: World, grid: Done, tmp_path: Path) -> None:
    """Two processes, an empty store each way: the same plans, metrics and verdicts."""
    if importlib.util.find_spec("hydra_plugins.hydra_joblib_launcher") is None:
        pytest.skip("hydra-joblib-launcher is not installed (pip install eaft_prune[joblib])")
    joblib = own.elsewhere(tmp_path).run(
        *DISTINCT, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"
    )
    for done in (grid, joblib):
        assert done.code == 0, done.out + done.err
        assert [result["job"] for result in done.results] == [0, 1, 2, 3]
        parents = {
            MlflowClient(tracking_uri=own.uri)
            .get_run(r["mlflow_run_id"])
            .data.tags["mlflow.parentRunId"]
            for r in done.results
        }
        assert len(parents) == 1
    for one, other in zip(grid.results, joblib.results, strict=True):
        for part in ("gate", "plan", "reports", "digests", "base"):
            assert one[part] == other[part], part
    for name in ("overrides", "status", "verdict", "ΔPPL %", "plan", "exit code"):
        assert [r[name] for r in summary(grid)] == [r[name] for r in summary(joblib)]


def test_results_of_an_earlier_multirun_in_the_same_directory_do_not_count(
    own: World, grid: Done, tmp_path: Path
) -> None:
    one = (*MASKED, "pruning.seed=0", f"hydra.sweep.dir={tmp_path}/out")
    assert own.run(*one).code == 0
    stale = tmp_path / "out" / "0" / "result.json"
    before = stale.stat().st_mtime_ns
    (tmp_path / "out" / "7").mkdir()
    (tmp_path / "out" / "7" / "result.json").write_text(stale.read_text())
    assert own.run(*one).code == 0
    assert stale.stat().st_mtime_ns != before
    with (tmp_path / "out" / "summary.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 1


def test_points_without_memory_and_points_that_exit_leave_the_others_alone(
    own: World, grid: Done, monkeypatch: pytest.MonkeyPatch
) -> None:
    """numpy, which draws the random plan, gives up in three of five points."""
    ends = {
        7001: MemoryError("Unable to allocate 1.00 TiB for an array"),
        7002: SystemExit(3),
        7003: SystemExit(0),
    }
    draw = np.random.default_rng

    def default_rng(seed: Any = None) -> np.random.Generator:
        if isinstance(seed, int) and seed in ends:
            raise ends[seed]
        return draw(seed)

    monkeypatch.setattr(np.random, "default_rng", default_rng)
    done = own.run(*MASKED, "pruning.seed=0,7001,7002,7003,3")
    assert done.code == 1
    errors = ["", f"MemoryError: {ends[7001]}", "SystemExit: 3", "SystemExit: 0", ""]
    rows = summary(done)
    assert [row["error"] for row in rows] == errors
    wanted = ["FAILED" if error else "FINISHED" for error in errors]
    assert [row["status"] for row in rows] == wanted
    assert [row["exit code"] for row in rows] == ["1" if error else "0" for error in errors]
    for number, error in enumerate(errors):  # the table at the end
        lines = [line for line in done.out.splitlines() if line.startswith(f"job {number} ")]
        assert lines == [f"job {number:<7} {error}"] * bool(error)
    assert evaluated(done.results[4]) == 1  # it ran after the failures
    client = MlflowClient(tracking_uri=own.uri)
    runs = [client.get_run(result["mlflow_run_id"]) for result in done.results]
    assert [run.info.status for run in runs] == wanted
    assert [run.data.tags.get("error", "") for run in runs][1] == errors[1]
    (parent,) = {run.data.tags["mlflow.parentRunId"] for run in runs}
    assert client.get_run(parent).info.status == "FAILED"
    assert client.get_run(parent).data.metrics["summary/jobs_failed"] == 3


def test_a_tracking_server_that_does_not_answer_is_one_line(own: World) -> None:
    done = own.run(*DISTINCT, "tracking.uri=http://127.0.0.1:9")
    assert done.code == 2
    assert "error: tracking.uri" in done.err
    assert not done.results


@pytest.mark.slow
def test_ctrl_c_kills_truthfully_and_the_sweep_goes_on(own: World, tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlruns/mlflow.db"
    world = own.elsewhere(tmp_path / "world", uri=uri)
    world.home.mkdir()
    three = (*MASKED, "pruning.seed=0,1,2")
    process = world.start(*three)
    process.reach("FAIL", "PASS", "INCONCLUSIVE")
    process.send(signal.SIGINT)  # the first point is done
    code = process.wait()
    assert code == 130, process.text
    left = Done(code, process.text, "", process.cwd)
    rows = summary(left)
    assert len(rows) == 3
    statuses = [row["status"] for row in rows]
    assert statuses[-1] == "CANCELLED"
    assert set(statuses) <= {"FINISHED", "CANCELLED"}
    assert "not run: the multirun was stopped" in left.out
    client = MlflowClient(tracking_uri=world.uri)
    ids = [r["mlflow_run_id"] for r in left.results if r["mlflow_run_id"]]
    runs = [client.get_run(run_id) for run_id in ids]
    (parent,) = {run.data.tags["mlflow.parentRunId"] for run in runs}
    assert client.get_run(parent).info.status == "KILLED"
    assert {run.info.status for run in runs} <= {"FINISHED", "KILLED"}
    again = world.run(*three)
    assert again.code == 0
    assert evaluated(again.results[0]) < 2  # what was measured before Ctrl-C is not measured again
