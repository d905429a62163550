"""Tasks, result.json, exit codes, multiruns and what MLflow keeps of them."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from support import runs
from support.runs import REPOSITORY, Done, World
from support.worlds import LENGTHS

from eaft_prune.maths.metrics import DIVERGENCE

pytest_plugins = ("support.worlds",)

METRICS = {
    "ppl", "mean_prob", "mean_entropy", "cc_rate", "cc_rate_base_thr", "js2d", "scored_tokens",
}  # fmt: skip


CHECKS = ("dppl", "dppl_relative", "dcc_rate", "dmean_prob", "js2d")


def mlflow_run(world: World, run_id: str) -> Run:
    return MlflowClient(tracking_uri=world.uri).get_run(run_id)


def test_result_json_has_what_the_contract_names(world: World, pipeline: Done) -> None:
    result = pipeline.result
    assert result["status"] == "FINISHED"
    assert result["task"] == "pipeline"
    assert result["exit_code"] == pipeline.code == 0
    assert result["error"] is None
    assert set(result["gate"]) >= {"status", "checks", "failed_checks"}
    for check in result["gate"]["checks"]:
        assert set(check) >= {"name", "pack", "seq_len", "value", "limit", "passed"}
        assert check["passed"] == (abs(check["value"]) <= check["limit"])
    names = [(check["name"], check["seq_len"]) for check in result["gate"]["checks"]]
    assert sorted(names) == sorted((name, seq_len) for name in CHECKS for seq_len in (32, 64))
    plan = result["plan"]
    assert [len(ids) for ids in plan["kept"]] == [4, 4]
    assert all(ids == sorted(set(ids)) and set(ids) <= set(range(8)) for ids in plan["kept"])
    assert len(plan["digest"]) == 64
    assert set(result["reports"]) == {"base", "pruned"}
    for report in result["reports"].values():
        assert set(report) == {"alpha", "beta", "gamma", "UNION"}
        for by_length in report.values():
            assert set(by_length) == {"32", "64"}
            for values in by_length.values():
                assert set(values) >= METRICS
                assert isinstance(values["scored_tokens"], int)
    for values in result["reports"]["base"]["UNION"].values():
        assert values["js2d"] == 0
        assert values["cc_rate"] == values["cc_rate_base_thr"]
    stages = {stage["stage"] for stage in result["stages"]}
    assert {"profile", "score", "plan", "export"} <= stages
    assert set(result["seconds"]) == set(result["digests"]) == stages
    assert all(len(sha) == 64 for sha in result["digests"].values())
    assert result["mlflow_run_id"]
    # and what it points at is there
    checkpoint = Path(result["checkpoint"]["path"])
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    assert manifest["digest"] == result["checkpoint"]["digest"]
    assert manifest["plan"]["kept"] == plan["kept"]
    assert json.loads((checkpoint / "config.json").read_text())["num_local_experts"] == 4
    mapping = json.loads((checkpoint / "expert_mapping.json").read_text())["new_to_old"]
    assert [[mapping[str(i)][str(j)] for j in range(4)] for i in range(2)] == plan["kept"]
    assert Path(result["base"]["path"]) == world.model


def test_the_run_prints_table_verdict_and_where_things_are(pipeline: Done) -> None:
    result = pipeline.result
    gate = result["gate"]
    verdict = next(line for line in pipeline.out.splitlines() if line.startswith(gate["status"]))
    assert gate["plain_failed_checks"]
    for label in gate["failed_checks"] or gate["undecided_checks"]:
        assert label in verdict
    report = next(line for line in pipeline.out.splitlines() if line.startswith("report"))
    page = Path(report.split()[1])
    assert result["plan"]["digest"][:12] in page.read_text()
    assert result["checkpoint"]["path"] in pipeline.out
    assert "mlflow ui --backend-store-uri sqlite:///" in pipeline.out
    assert result["mlflow_run_id"] in pipeline.out
    for pack in ("UNION", "alpha", "beta", "gamma"):
        assert pipeline.out.count(f"\n{pack}") >= 2  # a block of rows a length


def test_mlflow_keeps_what_result_json_says(world: World, pipeline: Done) -> None:
    result = pipeline.result
    run = mlflow_run(world, result["mlflow_run_id"])
    assert run.info.status == "FINISHED"
    tags = run.data.tags
    gate = result["gate"]
    assert tags["gate.status"] == gate["status"] != "PASS"
    assert tags["gate.plain_status"] == gate["plain_status"] == "FAIL"
    for name in ("failed_checks", "undecided_checks", "plain_failed_checks"):
        assert tags[f"gate.{name}"] == ",".join(gate[name])
    for check in gate["checks"]:
        change = result["changes"]["pruned"]["UNION"][str(check["seq_len"])]
        report = result["reports"]["pruned"]["UNION"][str(check["seq_len"])]
        assert change["rows"] == report["rows"]
        if check["name"] not in change:  # JS2D of so few tokens
            assert check["outcome"] == "INCONCLUSIVE"
            continue
        assert check["rows"] == report["rows"]
        for name in ("estimate", "low", "high", "limit"):
            logged = f"verdict/{check['name']}/UNION/{check['seq_len']}/{name}"
            assert run.data.metrics[logged] == check[name]
        assert check["low"] <= check["high"]
    assert tags["plan.digest"] == result["plan"]["digest"]
    for stage in result["stages"]:
        assert tags[f"stage.{stage['stage']}"] == stage["key"]
    wanted = {
        f"tables/{pack}/{seq_len}/{name}": values[name]
        for pack, lengths in result["reports"]["pruned"].items()
        for seq_len, values in lengths.items()
        for name in METRICS
    }
    assert len(wanted) == 4 * 2 * len(METRICS)
    for name, value in wanted.items():
        assert run.data.metrics[name] == value, name
    ppl = [result["reports"][m]["UNION"]["64"]["ppl"] for m in ("base", "pruned")]
    growth = 100 * (ppl[1] / ppl[0] - 1)
    assert run.data.metrics["tables/UNION/64/dppl_percent"] == pytest.approx(growth)
    assert run.data.params["pruning.keep_n"] == "4"
    assert {entry.dataset.name for entry in run.inputs.dataset_inputs} == set(world.packs)
    client = MlflowClient(tracking_uri=world.uri)
    artifacts = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert {"result.json", "report.html", "report.md", "config.yaml"} <= artifacts


@pytest.mark.parametrize(
    ("confidence", "status"), [("null", "FAIL"), ("0.9999999", "INCONCLUSIVE")]
)
def test_gate_on_fail_error_is_exit_code_3_unless_it_passes(
    world: World, pipeline: Done, confidence: str, status: str
) -> None:
    done = world.run("gate.on_fail=error", f"gate.confidence={confidence}")
    assert done.code == 3
    result = done.result
    assert (result["status"], result["exit_code"]) == ("FINISHED", 3)
    assert (result["gate"]["status"], result["gate"]["plain_status"]) == (status, "FAIL")
    assert mlflow_run(world, result["mlflow_run_id"]).info.status == "FINISHED"


def test_gate_on_fail_error_of_a_gate_that_passes_is_0(world: World) -> None:
    wide = [f"gate.max_{name}=1e9" for name in ("dppl", "dppl_relative")]
    wide += [f"gate.max_{name}=1" for name in ("dcc_rate", "dmean_prob", "js2d")]
    done = world.run("gate.on_fail=error", "eval.num_blocks=all", *wide)
    assert done.code == 0
    assert done.result["gate"]["status"] == "PASS"
    run = mlflow_run(world, done.result["mlflow_run_id"])
    assert run.data.tags["gate.status"] == "PASS"
    assert run.data.tags["gate.failed_checks"] == ""


def test_the_gate_of_further_packs_reads_them(world: World) -> None:
    done = world.run(
        "gate=near_lossless_v1_packs", "gate.seq_lens=[64]", "eval.packs=[UNION,alpha,beta]",
        "gate.packs.alpha={max_js2d: 0.7}",
    )  # fmt: skip
    assert done.code == 0
    assert [(c["pack"], c["name"]) for c in done.result["gate"]["checks"]] == [
        *(("UNION", name) for name in CHECKS),
        ("alpha", "js2d"),
        *(("beta", name) for name in ("dppl", "dppl_relative", "dmean_prob")),
    ]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("gate.packs={gamma: {max_dppl: 1}}", "'gamma'"),
        ("gate.packs={UNION: {max_dppl: 1}}", "'UNION'"),
        ("gate.packs={alpha: {max_pl: 1}}", "max_pl"),
        ("gate.packs={alpha: {}}", "at least one limit"),
        ("gate.confidence=0.3", "gate.confidence"),
    ],
)
def test_gates_that_mean_nothing_are_refused(world: World, override: str, said: str) -> None:
    line = world.run("eval.packs=[UNION,alpha]", override).refused()
    assert "gate." in line
    assert said in line


def test_a_crash_is_failed_code_1_and_said_everywhere(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A metric of the user's divides by zero: an error that nobody expects."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "crashing.py").write_text(
        "from eaft_prune.maths.metrics import Metric\n"
        "BAD = Metric('bad', 'bad', 'Nothing.', per_token=lambda scores: 1 / 0)\n"
    )
    done = world.run("gate.metrics={crashing\\:BAD: 1}")
    error = done.failed(code=1)
    assert "division by zero" in error
    assert error.splitlines()[0] in done.out + done.err
    run = mlflow_run(world, done.result["mlflow_run_id"])
    assert run.info.status == "FAILED"
    assert run.data.tags["error"] == error.replace("\n", " ")


def test_profile_only_selects(world: World, pipeline: Done) -> None:
    done = world.run("task=profile")
    assert done.code == 0
    result = done.result
    assert result["plan"]["kept"] == pipeline.result["plan"]["kept"]
    assert result["gate"] is None
    assert result["checkpoint"] is None
    assert result["reports"] == {}


def test_prune_writes_the_pipelines_checkpoint_and_evaluates_nothing(
    world: World, pipeline: Done, tmp_path: Path
) -> None:
    done = world.run("task=prune", f"runtime.checkpoint_dir={tmp_path}")
    assert done.code == 0, done.out + done.err
    whole = pipeline.result
    assert done.result["plan"] == whole["plan"]
    assert done.result["checkpoint"]["digest"] == whole["checkpoint"]["digest"]
    assert Path(done.result["checkpoint"]["path"]).parent == tmp_path
    assert done.result["reports"] == {}
    assert not [s for s in done.result["stages"] if s["stage"].startswith("evaluate")]


def test_predownload_checks_and_hashes_and_runs_no_model(world: World, pipeline: Done) -> None:
    done = world.run("task=predownload")
    assert done.code == 0, done.out + done.err
    facts = done.result["facts"]
    assert facts["base_digest"] == pipeline.result["base"]["digest"]
    assert facts["packs"] == {name: str(path) for name, path in world.packs.items()}
    assert [stage["stage"] for stage in done.result["stages"]] == ["inspect/base"]


def test_the_memo_is_of_the_runs_that_finished(world: World, pipeline: Done) -> None:
    done = world.run("task=memo", "memo.filter=\"params.`pruning.keep_n` = '4'\"")
    assert done.code == 0, done.out + done.err
    text = Path(done.result["facts"]["memo"]).read_text()
    check = max(
        pipeline.result["gate"]["checks"], key=lambda check: abs(check["value"]) / check["limit"]
    )
    assert f"{check['pack']}@{check['seq_len']}" in text
    assert pipeline.result["mlflow_run_id"][:8] in text
    kept = MlflowClient(world.uri).list_artifacts(done.result["mlflow_run_id"])
    assert "memo.md" in {item.path for item in kept}
    refused = world.run("task=memo", "memo.filter='nonsense ='")
    assert "memo.filter" in refused.failed()
    assert "memo.experiment" in world.run("task=memo", "memo.experiment=none").failed()


def test_noise_floor_is_exactly_zero(world: World) -> None:
    done = world.run("task=noise_floor")
    assert done.code == 0
    result = done.result
    assert result["gate"]["status"] == "PASS"
    assert [check["value"] for check in result["gate"]["checks"]] == [0] * 5
    evaluated = [s for s in result["stages"] if s["stage"].startswith("evaluate/")]
    # the repeat is measured, not the first one read again
    assert len({stage["key"] for stage in evaluated}) == len(evaluated) == 2


def test_noop_writes_identical_tensors_and_passes(world: World) -> None:
    done = world.run("task=noop")
    assert done.code == 0
    result = done.result
    assert result["gate"]["status"] == "PASS"
    assert [check["value"] for check in result["gate"]["checks"]] == [0] * 5
    written = Path(result["checkpoint"]["path"])
    source, target = tensors(world.model), tensors(written)
    assert source == target
    assert result["facts"]["identical_tensors"] == len(source)
    assert json.loads((written / "config.json").read_text()) == json.loads(
        (world.model / "config.json").read_text()
    )


def tensors(model: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """dtype, shape and bytes of every tensor, read without the package."""
    out = {}
    for path in model.glob("*.safetensors"):
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8 : 8 + length]).items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                start = 8 + length
                out[name] = entry["dtype"], entry["shape"], data[start + begin : start + end]
    return out


def test_expert_math_agrees_with_eager_and_float64(world: World) -> None:
    done = world.run("task=expert_math")
    assert done.code == 0
    facts = done.result["facts"]
    assert set(facts) == {
        f"layer{layer}_{what}" for layer in (0, 1) for what in ("eager", "float64", "norm")
    }
    for name, value in facts.items():
        assert 0 <= value <= 1e-5, name
    assert any(value > 0 for value in facts.values())  # float32 against float64 is never exact
    worst = max(facts, key=lambda name: float(facts[name]))
    assert f"PASS  the largest relative error is {facts[worst]:.2g} ({worst})" in done.out


def test_expert_math_that_is_wrong_fails(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from eaft_prune.engines import experts

    true = experts.experts_forward
    monkeypatch.setattr(experts, "experts_forward", lambda *args: 1.01 * true(*args))
    done = world.run("task=expert_math")
    assert done.code == 3
    assert "FAIL  the largest relative error is 0.01 " in done.out
    assert "1e-05 that float32" in done.out


def test_profile_shows_plan_and_scores(world: World) -> None:
    done = world.run("task=profile")
    assert done.code == 0
    plan = done.result["plan"]
    assert f"plan {plan['digest'][:8]}" in done.out
    rows = [line.split() for line in done.out.splitlines() if re.match(r"[01] +4 ", line)]
    assert [len(row) for row in rows] == [6, 6]


@pytest.mark.slow
def test_compare_gives_the_pipelines_verdict(world: World, pipeline: Done, tmp_path: Path) -> None:
    """From two task=evaluate runs, and from what the pipeline saved; no model, no pack is read."""
    lengths = ("eval.packs=null", *LENGTHS)
    pruned = pipeline.result["checkpoint"]["path"]
    evaluated = [
        world.run("task=evaluate", *lengths, f"model.path={path}") for path in (world.model, pruned)
    ]
    for done in evaluated:
        assert done.code == 0
        assert set(done.result["reports"]) == {"base"}
        assert done.result["gate"] is None
    apart = [done.result["evaluations"]["base"] for done in evaluated]
    together = [pipeline.result["evaluations"][name] for name in ("base", "pruned")]
    nowhere = ("model.path=/nowhere", "packs.files={alpha: /nowhere}")
    nowhere = (*nowhere, f"runtime.store_dir={tmp_path / 'unused'}")
    for base, candidate in (apart, together):
        done = world.run(
            "task=compare", f"compare.base={base}", f"compare.candidate={candidate}",
            *lengths, *nowhere,
        )  # fmt: skip
        assert done.code == 0, done.out
        assert done.result["gate"] == pipeline.result["gate"]
        # who was evaluated alone was not asked for what the other finds likely
        left_out = {m.name for m in DIVERGENCE if m.needs} if base == apart[0] else set()
        for name, report in pipeline.result["reports"].items():
            for pack, lengths_of in report.items():
                for seq_len, numbers in lengths_of.items():
                    kept = {k: v for k, v in numbers.items() if k not in left_out}
                    assert done.result["reports"][name][pack][seq_len] == kept
        assert [stage["stage"] for stage in done.result["stages"]] == ["compare"]


@pytest.mark.parametrize("damage", ["missing", "not an evaluation", "other tokens", "half"])
def test_compare_of_what_cannot_be_compared(
    world: World, pipeline: Done, tmp_path: Path, damage: str
) -> None:
    base, other = (Path(pipeline.result["evaluations"][name]) for name in ("base", "pruned"))
    candidate = tmp_path / "candidate"
    if damage != "missing":
        shutil.copytree(other, candidate)
    file = candidate / "evaluation.json"
    if damage == "not an evaluation":
        file.write_text("{}")
    if damage == "other tokens":
        facts = json.loads(file.read_text())
        facts["token_digests"][0][-1] = "0" * 64
        file.write_text(json.dumps(facts))
    if damage == "half":
        shutil.rmtree(candidate / "UNION" / "64")
    done = world.run("task=compare", f"compare.base={base}", f"compare.candidate={candidate}")
    error = done.failed()
    assert "tokens" in error if damage == "other tokens" else str(candidate) in error
    assert "\n" not in error


@pytest.mark.slow
def test_a_multirun_runs_every_point_and_tells_of_the_one_that_failed(
    world: World, pipeline: Done, tmp_path: Path
) -> None:
    damaged = world.copied(tmp_path).model
    (shard, *_) = sorted(damaged.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    done = world.run(
        "eval.candidates=[masked]", "-m", f"model.path={world.model},{damaged}", "eval.seed=1,2"
    )
    assert done.code == 2  # the worst of 0, 0, 2, 2
    good, bad = done.results[:2], done.results[2:]
    assert [r["job"] for r in done.results] == [0, 1, 2, 3]
    assert [r["status"] for r in good] == ["FINISHED"] * 2
    assert [r["status"] for r in bad] == ["FAILED"] * 2
    assert all(str(shard) in r["error"] for r in bad)
    assert good[0]["plan"] == good[1]["plan"]
    tokens = [r["digests"]["pack/eval/UNION/64"] for r in good]
    assert tokens[0] != tokens[1]  # eval.seed draws the blocks
    (summary,) = done.cwd.rglob("summary.csv")
    with summary.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["status"] for row in rows] == ["FINISHED", "FINISHED", "FAILED", "FAILED"]
    assert [row["exit code"] for row in rows] == ["0", "0", "2", "2"]
    assert [row["verdict"] for row in rows[:2]] == [r["gate"]["status"] for r in good]
    assert "eval.seed=2" in rows[3]["overrides"]
    assert str(shard) in rows[3]["error"]
    assert str(shard) in done.out  # the final table tells too
    assert str(summary) in done.out
    children = [mlflow_run(world, r["mlflow_run_id"]) for r in done.results]
    parents = {child.data.tags["mlflow.parentRunId"] for child in children}
    assert len(parents) == 1
    assert [child.info.status for child in children] == ["FINISHED"] * 2 + ["FAILED"] * 2
    parent = mlflow_run(world, parents.pop())
    assert parent.info.status == "FAILED"
    assert parent.data.metrics["summary/jobs"] == 4
    assert parent.data.metrics["summary/jobs_failed"] == 2
    artifacts = MlflowClient(tracking_uri=world.uri).list_artifacts(parent.info.run_id)
    assert {item.path for item in artifacts} >= {"summary.csv", "summary.md"}


@pytest.mark.slow
def test_the_multirun_of_the_readme(world: World, pipeline: Done) -> None:
    """`pruning.keep_n=... -m eval.seed=...` and a sweep by name, whose points share their plan."""
    lean = ("eval.candidates=[masked]", "eval.num_blocks=2")
    typed = world.run(*lean, "pruning.keep_n=4", "-m", "eval.seed=1,2,3")
    assert typed.code == 0, typed.out
    assert len(typed.results) == 3
    named = world.run(*lean, "+sweeps=seeds")
    assert named.code == 0, named.out
    assert [r["reports"] for r in named.results] == [r["reports"] for r in typed.results]
    for first, second in zip(typed.results, named.results, strict=True):
        assert [s["key"] for s in first["stages"]] == [s["key"] for s in second["stages"]]
        assert all(s["cached"] for s in second["stages"])
    parent = mlflow_run(world, typed.results[0]["mlflow_run_id"]).data.tags["mlflow.parentRunId"]
    assert mlflow_run(world, parent).info.status == "FINISHED"


def test_eval_packs_num_blocks_and_candidates_do_what_they_say(world: World) -> None:
    done = world.run(
        "eval.packs=[beta,UNION]", "eval.num_blocks={beta: 2, default: 3}",
        "eval.candidates=[masked,pruned]",
    )  # fmt: skip
    result = done.result
    assert list(result["reports"]) == ["base", "masked", "pruned"]
    for report in result["reports"].values():
        assert {pack: report[pack]["64"]["blocks"] for pack in report} == {"beta": 2, "UNION": 3}
    masked, pruned = (result["reports"][name]["UNION"]["64"] for name in ("masked", "pruned"))
    for name in METRICS:
        assert masked[name] == pytest.approx(pruned[name], rel=1e-5, abs=1e-7)


def test_seeds_draw_and_equal_seeds_draw_the_same(world: World, tmp_path: Path) -> None:
    """Rows by profile.seed, random experts by pruning.seed; the same in an empty store."""
    extra = ("task=profile", "pruning=random", "pruning.core_pos_top_m=0")

    def drawn(where: World, seed: str) -> tuple[str, Any]:
        result = where.run(*extra, f"profile.seed={seed}", f"pruning.seed={seed}").result
        return result["digests"]["pack/profile/UNION/64"], result["plan"]["kept"]

    rows, kept = zip(*(drawn(world, seed) for seed in ("1", "2", "3")), strict=True)
    assert len(set(rows)) == 3
    assert len({str(plan) for plan in kept}) > 1
    assert drawn(world.elsewhere(tmp_path), "2") == (rows[1], kept[1])


def test_profile_and_evaluation_share_no_row(world: World) -> None:
    """packs.split=hash: the same number of blocks, other rows; none: the same rows."""
    same = ("eval.num_blocks=8", "task=pipeline", "eval.candidates=[masked]")

    def digests(split: str) -> list[str]:
        stages = world.run(*same, f"packs.split={split}").result["stages"]
        facts = {stage["stage"]: stage["facts"] for stage in stages}
        return [facts[f"pack/{part}/UNION/64"]["rows_digest"] for part in ("profile", "eval")]

    profiled, evaluated = digests("hash")
    assert profiled != evaluated
    profiled, evaluated = digests("none")
    assert profiled == evaluated


def test_the_process_gives_the_exit_code(world: World, tmp_path: Path) -> None:
    """And says nothing else: no migration log of a new database, no git hint, no warning."""
    fresh = world.elsewhere(tmp_path, uri=f"sqlite:///{tmp_path}/new/mlflow.db")
    done = runs.process([*fresh.arguments, f"model.path={tmp_path}"], tmp_path)
    assert done.code == 2
    assert "config.json" in done.result["error"]
    assert done.err == f"error: {done.result['error']}\n"


@pytest.mark.process
def test_the_first_line_comes_before_any_library_is_loaded(world: World) -> None:
    """With MLflow and torch out of reach a run says what begins, and only then fails."""
    code = (
        "import sys; sys.modules['mlflow'] = sys.modules['torch'] = None\n"
        "from eaft_prune.cli.main import main\n"
        f"main({[*world.arguments, 'runtime.progress=true']!r})"
    )
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY / "src")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=world.home, env=env
    )
    first = done.stderr.splitlines()[0]
    assert first.startswith("task=pipeline model=local packs=local, results in ")
