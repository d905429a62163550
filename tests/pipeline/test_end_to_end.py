"""The stage store through the front door: run twice, run differently, be killed and run again."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from support.runs import World, untouched

pytest_plugins = ("support.worlds",)


@pytest.fixture(scope="module")
def undisturbed(world: World) -> dict[str, Any]:
    """The quick pipeline in the shared store."""
    done = world.run()
    assert done.code == 0, done.out + done.err
    return done.result


def cached(result: dict[str, Any]) -> dict[str, bool]:
    return {stage["stage"]: stage["cached"] for stage in result["stages"]}


def keys(result: dict[str, Any]) -> dict[str, str]:
    return {stage["stage"]: stage["key"] for stage in result["stages"]}


def statuses(world: World) -> dict[str, str]:
    client = MlflowClient(tracking_uri=world.uri)
    experiment = client.get_experiment_by_name("eaft_prune")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    return {run.info.run_id: run.info.status for run in runs}


def same_findings(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Digests of all outputs, the plan, every metric, the verdict and the written checkpoint."""
    found = ("plan", "reports", "gate")
    assert {name: one[name] for name in found} == {name: other[name] for name in found}
    assert one["checkpoint"]["digest"] == other["checkpoint"]["digest"]
    # inspect's key and output name the path and inode of the files
    mine, theirs = (
        {k: v for k, v in result["digests"].items() if not k.startswith("inspect/")}
        for result in (one, other)
    )
    assert mine == theirs


def scramble(model: Path) -> None:
    """Overwrite all tensor data in place; sizes, headers, inodes and times stay."""
    for shard in model.glob("*.safetensors"):
        before = shard.stat()
        data = bytearray(shard.read_bytes())
        begin = 8 + int.from_bytes(data[:8], "little")
        data[begin:] = b"\xff" * (len(data) - begin)  # NaN in every float
        with shard.open("r+b") as file:
            file.write(data)
        os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_second_identical_run_does_no_stage_work(world: World, tmp_path: Path) -> None:
    """Proved by taking the weights away: no stage could do its work again and be right."""
    place = world.copied(tmp_path)
    first = place.run().result
    assert not any(cached(first)[f"evaluate/{model}/UNION/64"] for model in ("base", "pruned"))
    scramble(place.model)
    scramble(Path(first["checkpoint"]["path"]))
    with untouched(place.model, place.checkpoints):
        done = place.run()
    assert done.code == 0
    second = done.result
    assert all(cached(second).values())
    assert set(second["seconds"].values()) == {0.0}
    assert keys(second) == keys(first)
    assert second["digests"] == first["digests"]
    same_findings(first, second)
    count = len(second["stages"])
    assert f"{count} stages, {count} of them from the store" in done.out


def test_the_card_of_a_checkpoint_tells_its_verdict(world: World, tmp_path: Path) -> None:
    """Also after another gate; and nothing that somebody wrote is lost."""
    place = world.elsewhere(tmp_path)
    first = place.run().result
    path = Path(first["checkpoint"]["path"])
    (report,) = first["reports"]["pruned"]["UNION"].values()
    told = (path / "README.md").read_text()
    assert f"**{first['gate']['status']}** on {report['scored_tokens']:,} tokens" in told
    labels = {
        "dppl": "Δ PPL",
        "dppl_relative": "Δ PPL / PPL",
        "dcc_rate": "Δ CC rate",
        "dmean_prob": "Δ mean p",
        "js2d": "JS2D",
    }
    rows = [line.split(" | ")[0] for line in told.splitlines() if "| UNION | 64 |" in line]
    assert rows == [f"| {labels[check['name']]}" for check in first["gate"]["checks"]]
    (path / "README.md").write_text(f"{told}\nmine\n")
    second = place.run("gate.max_js2d=1e-9", "gate.max_dmean_prob=1e-9").result
    assert second["gate"]["status"] != "PASS"
    again = (path / "README.md").read_text()
    assert f"**{second['gate']['status']}** on" in again
    assert again.endswith("\nmine\n")
    assert place.run("task=verify", f"verify.path={path}", "verify.load=false").code == 0


def test_an_empty_store_elsewhere_gives_the_same_bytes(
    world: World, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    result = world.elsewhere(tmp_path).run().result
    assert not cached(result)["profile"]
    same_findings(undisturbed, result)
    here, there = keys(undisturbed), keys(result)
    assert {stage for stage in here if here[stage] != there[stage]} == {"inspect/pruned"}  # a path


@pytest.mark.parametrize(
    "settings",
    [
        ["runtime.batch_tokens=1"],
        ["runtime.threads=2", "runtime.progress=true", "runtime.device=cpu"],
        ["runtime.threads=null", "tracking.run_name=other", "+tracking.tags={a: b}"],
        ["runtime.dtype=float32"],  # what auto is on a CPU
        ["gate.max_js2d=0.5", "gate.on_fail=report"],
    ],
)
def test_what_changes_no_number_changes_no_key(
    world: World, undisturbed: dict[str, Any], settings: list[str]
) -> None:
    result = world.run(*settings).result
    assert keys(result) == keys(undisturbed)
    assert all(cached(result).values())


def test_the_same_metrics_in_batches_of_another_size(
    world: World, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    """The reason why batch_tokens may stay out of keys."""
    place = world.elsewhere(tmp_path)
    result = place.run("runtime.batch_tokens=130", "runtime.threads=2").result
    assert not cached(result)["evaluate/base/UNION/64"]
    assert result["plan"] == undisturbed["plan"]
    for model, report in undisturbed["reports"].items():
        again = result["reports"][model]["UNION"]["64"]
        for name in ("ppl", "mean_prob", "mean_entropy", "scored_tokens"):
            assert again[name] == pytest.approx(report["UNION"]["64"][name], rel=1e-5), name


def test_other_weights_with_the_same_plan_cost_a_score_and_a_plan(
    world: World, undisturbed: dict[str, Any]
) -> None:
    doubled = ("pruning.w_good=2", "pruning.w_uncertain=0.5", "pruning.w_conflict=-4")
    result = world.run(*doubled).result
    assert {stage for stage, hit in cached(result).items() if not hit} == {"score", "plan"}
    assert result["plan"] == undisturbed["plan"]
    assert result["reports"] == undisturbed["reports"]


def test_another_plan_costs_only_the_candidate(world: World, undisturbed: dict[str, Any]) -> None:
    result = world.run(
        "pruning=random", "pruning.core_pos_top_m=0", "pruning.seed=5", "pruning.keep_n=4"
    ).result
    assert result["plan"]["kept"] != undisturbed["plan"]["kept"]
    assert {stage for stage, hit in cached(result).items() if not hit} == {
        "score", "plan", "export", "inspect/pruned", "evaluate/pruned/UNION/64",
        "divergence/pruned/UNION/64", "coverage", "passages/pruned/UNION", "compare",
    }  # fmt: skip


@pytest.mark.parametrize("settings", ["eval.cc_quantile=0.2", "gate.confidence=0.9"])
def test_another_question_costs_only_the_comparison(world: World, settings: str) -> None:
    assert world.run().code == 0
    result = world.run(settings).result
    assert {stage for stage, hit in cached(result).items() if not hit} == {"compare"}


def test_other_rows_are_other_keys_down_the_line(world: World, undisturbed: dict[str, Any]) -> None:
    result = world.run("profile.seed=7", "eval.seed=7", "eval.candidates=[masked]").result
    changed = keys(result)
    for stage in ("pack/profile/UNION/64", "profile", "score", "evaluate/base/UNION/64"):
        assert changed[stage] != keys(undisturbed)[stage]
    assert cached(result)["inspect/base"]


@pytest.mark.dear
@pytest.mark.slow
def test_kill_9_at_any_moment_and_run_again(world: World, tmp_path: Path) -> None:
    """Killed after hashing, within the export and within the evaluation; then run to the end."""
    uri = f"sqlite:///{tmp_path}/mlruns/mlflow.db"
    place = replace(world.copied(tmp_path), uri=uri)
    for number in range(200):  # each is copied and synced: the export takes long enough to hit
        (place.model / f"note-{number:03d}.txt").write_text("a companion file\n")

    run = place.start()
    run.reach("inspect/base")
    assert run.kill()

    run = place.start()
    run.reach("score")
    while run.alive and not list(place.checkpoints.glob(".*.draft")):
        pass
    assert run.kill()
    assert list(place.checkpoints.glob(".*.draft")), "the kill came too late to test the export"
    assert not [p for p in place.checkpoints.glob("*") if not p.name.startswith(".")]

    run = place.start()
    run.reach("inspect/pruned")
    assert run.kill()
    assert not list(place.checkpoints.glob(".*.draft"))
    killed = set(statuses(place))
    assert len(killed) == 3

    done = place.run()
    assert done.code == 0, done.out
    result = done.result
    for stage in ("inspect/base", "profile", "score", "plan", "export"):
        assert cached(result)[stage], stage
    assert not [p for p in place.store.rglob("*") if p.name.endswith(".draft")]
    (written,) = (p for p in place.checkpoints.glob("*") if not p.name.startswith("."))
    assert str(written) == result["checkpoint"]["path"]

    whole = World(tmp_path / "whole", place.model, place.packs, place.uri, place.settings)
    same_findings(result, whole.run().result)
    assert {status for run, status in statuses(place).items() if run in killed} == {"KILLED"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "reason"),
    [(signal.SIGINT, 130, "SIGINT"), (signal.SIGTERM, 143, "SIGTERM")],
)
def test_a_signal_is_recorded_as_killed(
    world: World, tmp_path: Path, number: signal.Signals, code: int, reason: str
) -> None:
    """SIGTERM ends a single run, SIGINT a multirun at its first job: both say so everywhere."""
    place = world.elsewhere(tmp_path, uri=f"sqlite:///{tmp_path}/mlruns/mlflow.db")
    several = number == signal.SIGINT
    process = place.start(*(["-m", "eval.seed=1,2"] if several else []))
    process.reach("inspect/base")
    process.send(number)
    assert process.wait() == code, process.text
    (path,) = tmp_path.rglob("result.json")  # of a multirun, the job that ran: no other started
    result = json.loads(path.read_text())
    assert (result["status"], result["exit_code"]) == ("KILLED", code)
    assert reason in result["error"]
    client = MlflowClient(tracking_uri=place.uri)
    run = client.get_run(result["mlflow_run_id"])
    assert run.info.status == "KILLED"
    assert run.data.tags["killed.reason"] == reason
    if several:
        parent = client.get_run(run.data.tags["mlflow.parentRunId"])
        assert parent.info.status == "KILLED"
    assert not [p for p in tmp_path.rglob("*.draft")]
    assert "Traceback" not in process.text
