"""Every file of benchmarks/ runs, at a size that takes a second or two."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from support import tiny
from support.engines import options
from support.forks import fork
from support.runs import REPOSITORY, Done, World, fresh_directory

from eaft_prune.checkpoints.read import open_model
from eaft_prune.core.store import save
from eaft_prune.core.types import KeepPlan
from eaft_prune.engines.loading import load_files
from eaft_prune.maths.divergence import js2d
from eaft_prune.records.evaluation import load_evaluation

pytest_plugins = ("support.worlds",)

pytestmark = [pytest.mark.process, pytest.mark.dear]

BENCHMARKS = REPOSITORY / "benchmarks"
FILES = sorted([*BENCHMARKS.glob("*.py"), *BENCHMARKS.glob("*.sh")])
CUDA = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICES = ["cpu", pytest.param("cuda", marks=CUDA)]
LITTLE_GB = "0.0001"  # less than the tiny model's weights need when dequantised
SMALL_RUNS = [
    "--forked", "--blocks", "6", "--seq-len", "64", "--profile-blocks", "8", "--search-blocks", "2",
]  # fmt: skip


@pytest.fixture(autouse=True)
def beside_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `python benchmarks/x.py` finds its neighbours."""
    monkeypatch.syspath_prepend(BENCHMARKS)


def script(name: str) -> ModuleType:
    return importlib.import_module(name)


def inputs(world: World) -> list[str]:
    """Settings that name the tiny model and its packs, but no place to write."""
    places = ("runtime.store_dir=", "runtime.checkpoint_dir=", "tracking.uri=")
    return [argument for argument in world.arguments if not argument.startswith(places)]


def test_gpu_benchmarks_import_without_what_gpu_machines_lack() -> None:
    """benchmarks/README.md and sglang_gpu.sh run them beside bare torch and transformers."""
    names = "gpu_throughput loading parallel_throughput compensation_gpu sglang_gpu export"
    names += " architecture_throughput"
    lacking = "hydra omegaconf mlflow optuna pyarrow"
    code = f"""
import importlib, sys
for name in {lacking.split()}:
    sys.modules[name] = None
for name in {names.split()}:
    importlib.import_module(name)
"""
    path = f"{BENCHMARKS}:{REPOSITORY / 'src'}"
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, check=True)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_there_is_a_test_for(file: Path) -> None:
    assert f"test_{file.name.replace('.py', '').replace('.', '_')}" in globals()


def test_common() -> None:
    common = script("common")
    blocks = common.random_blocks(3, 8, 50, share=0)
    assert blocks.scored_BS.sum(axis=1).tolist() == [1, 1, 1]
    assert blocks.scored_BS[:, -1].all()
    config = {
        "hidden_size": 2, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 5,
        "intermediate_size": 7, "num_experts_per_tok": 4, "num_local_experts": 11,
        "num_hidden_layers": 2, "sliding_window": 2, "vocab_size": 13,
    }  # fmt: skip
    projections, experts, router = 2 * 15 + 2 * 2 * 5 + 15 * 2, 4 * 3 * 2 * 7, 2 * 11
    # a full layer attends to half of 8 positions, a windowed one to 2; q k and the weighted sum
    attention = 2 * 15 * (8 / 2 + 2) / 2
    head = 2 * 13 / 4
    flops = 2 * (2 * (projections + experts + router + attention) + head)
    assert common.flops_per_token(config, 8, 1 / 4) == flops


def test_compensation(world: World, tmp_path: Path) -> None:
    main = script("compensation").main
    arguments = [
        *inputs(world), "--keep-n", "4", "--criteria", "eaft_reap", "--roundings", "nearest",
        "--blocks", "24", "--eval-blocks", "4", "--seq-len", "64", "--home", str(tmp_path),
    ]  # fmt: skip
    stored = main([*arguments, "--levels", "none", "down_proj", "experts"])
    dense = main([*arguments, "--levels", "none", "--unquantised"])
    key = "eaft_reap 4 none"
    assert stored[key].lost["UNION"] > 0
    assert dense[key].lost == pytest.approx(stored[key].lost, rel=1e-5)
    compensated = [one for name, one in stored.items() if name != key]
    assert len(compensated) == 2
    for one in compensated:
        assert one.lost["UNION"] < stored[key].lost["UNION"]
        assert 0 < one.facts["residual"] < 1


def test_distillation(world: World) -> None:
    how = ["--keep-n", "4", "--epochs", "2", "--batch", "2", "--eval-blocks", "4"]
    lengths = ["eval.seq_lens=[64]", "gate.seq_lens=[64]", "compensation.num_blocks=8"]
    found = script("distillation").main([*inputs(world), *lengths, *how, "--rates", "0", "1e-3"])
    assert found[0].after == pytest.approx(found[0].before, abs=1e-4)
    assert 0 < found[1e-3].after < found[1e-3].before


@pytest.mark.parametrize("device", DEVICES)
def test_architecture_throughput(device: str) -> None:
    rates = script("architecture_throughput").main(
        ["--model", "tiny", "--device", device, "--shrink", "64"]
    )
    assert len(rates) == 4
    assert all(0 < rate < math.inf for rate in rates.values())


@pytest.mark.parametrize("device", DEVICES)
def test_compensation_gpu(device: str) -> None:
    sizes = ["--tokens", "400", "--experts", "4", "--top-k", "2", "--size", "32"]
    exact, iterated, rounding = script("compensation_gpu").main(
        [*sizes, "--device", device, "--exact"]
    )
    assert 0 < exact < 1
    assert exact * (1 - 1e-5) <= iterated <= exact * 1.0005  # nothing is below the minimum
    assert rounding < 1


def test_cpu_throughput(checkpoint: Path) -> None:
    rates, apart = script("cpu_throughput").main(
        [
            "--path", str(checkpoint), "--blocks", "2", "--seq-len", "48", "--repeats", "1",
            "--matmul", "64",
        ]
    )  # fmt: skip
    assert len(rates) == 3
    assert all(0 < rate < math.inf for rate in rates.values())
    assert 0 < apart < 1e-3


def test_generation_speed(checkpoint: Path) -> None:
    rates, equal = script("generation_speed").main(
        [
            "--path", str(checkpoint), "--prompts", "3", "--longest", "9", "--new", "4",
            "--repeats", "1",
        ]
    )  # fmt: skip
    assert len(rates) == 2
    assert all(0 < rate < math.inf for rate in rates.values())
    assert equal == 1


def test_export(checkpoint: Path, tmp_path: Path) -> None:
    written = script("export").main(
        ["--path", str(checkpoint), "--out", str(tmp_path), "--keep-n", "4"]
    )
    base, pruned = open_model(checkpoint), open_model(tmp_path / "pruned")
    halved = {n: e.nbytes for n, e in base.tensors.items() if "experts." in n or "router." in n}
    assert pruned.weight_bytes == base.weight_bytes - sum(halved.values()) // 2
    assert written == pruned.weight_bytes
    assert not (tmp_path / "copy").exists()


def test_faults(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts = ["--kills", "0", "--damages", "1", "--disks", "0", "--races", "0"]
    only = ["--only", "store file", "--home", str(tmp_path)]
    assert script("faults").main([*counts, *only]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.endswith(("1 made again, equal", "1 not needed, equal"))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("part", "lines"), [("packed", 9), ("streamed", 1), ("peer", 4)])
def test_gpu_throughput(part: str, lines: int, device: str) -> None:
    """Traces of weights held in two ways are compared inside."""
    rates = script("gpu_throughput").main(
        ["--model", "tiny", "--device", device, "--shrink", "64", "--part", part]
    )
    assert len(rates) == lines
    assert all(0 < rate < math.inf for rate in rates.values())


def test_calibration(pipeline: Done) -> None:
    base, candidate = (pipeline.result["evaluations"][name] for name in ("base", "pruned"))
    saved = ["--evaluations", base, candidate, "--seq-len", "64"]
    made = ["--populations", "even", "conflicts in 3%"]
    lines = script("calibration").main(
        [*made, *saved, "--draws", "2", "--rows", "20", "--truth", "60"]
    )
    assert len(lines) == 2 * 4 + 3
    for line in lines:
        assert min(line.above, line.below, line.false_pass, line.false_fail) >= 0
        assert line.above + line.below <= 1
    early = script("calibration").main(
        [*made, "--draws", "2", "--rows", "40", "--truth", "60", "--early-stop"]
    )
    assert early == []


def test_populations() -> None:
    """Every one loses: its candidate is worse on average."""
    populations = script("populations").POPULATIONS
    for draw in populations.values():
        some = draw(3000, np.random.default_rng(0))
        assert len(np.unique(some.row_T)) == 3000
        assert len(some.row_T) == len(some.base) == len(some.other)
        assert 0.01 < (some.base.logp_T.astype(float) - some.other.logp_T).mean() < 0.12


def test_js2d_bias(pipeline: Done) -> None:
    base, candidate = (pipeline.result["evaluations"][name] for name in ("base", "pruned"))
    saved = [load_evaluation(Path(path)).scores["UNION", 64] for path in (base, candidate)]
    few, whole = script("js2d_bias").main(
        [base, candidate, "--seq-len", "64", "--tokens", "300", "100000"]
    )
    assert whole[:2] == [len(saved[0]), pytest.approx(js2d(*saved))]
    assert few[0] < whole[0]
    assert all(map(math.isfinite, few[:4]))  # of so few tokens its error is not known


@pytest.mark.parametrize("device", DEVICES)
def test_loading(checkpoint: Path, device: str) -> None:
    limit = [] if device == "cuda" else ["--limits", LITTLE_GB]
    found = script("loading").main(
        [
            "--path", str(checkpoint), *limit, "--device", device, "--blocks", "4",
            "--seq-len", "32", "--batch-tokens", "64",
        ]
    )  # fmt: skip
    assert len(found) > 1
    for rate, equal in found:
        assert 0 < rate < math.inf
        assert equal


def test_methods(world: World, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- methods: begin -->\nold\n<!-- methods: end -->\nafter\n")
    names = ("EAFT-REAP", "leave-one-out", "REAP sum, repaired")
    losses = script("methods").main(
        [
            "--keep", "8", "4", "--blocks", "4", "--seq-len", "64", "--seeds", "0",
            "--write", str(page), "--methods", *names, "--",
            *(a for a in inputs(world) if not a.startswith("pruning.keep_n")),
            "compensation.num_blocks=24", "marginal.num_blocks=2", "marginal.seq_len=64",
        ]
    )  # fmt: skip
    assert tuple(losses) == names
    for ((everything, half),) in losses.values():
        assert abs(everything) < 1e-3  # all 8 experts kept
        assert half > 1
    before, *table, after = page.read_text().splitlines()
    assert (before, after) == ("before", "after")
    assert "old" not in table
    assert sum(line.startswith("| leave-one-out |") for line in table) == 2


STUDY = [
    "--seeds", "0", "1", "--dropped", "0.25", "0.5", "--blocks", "8", "--seq-len", "64",
    "--weights",
]  # fmt: skip


def studied(world: World, out: Path, *more: str) -> dict[str, Any]:
    """study.json of the tiny model."""
    given = [a for a in inputs(world) if not a.startswith(("pruning.keep_n", "model"))]
    (path,) = (a.split("=", 1)[1] for a in inputs(world) if a.startswith("model.path"))
    script("study").main(
        [
            "--models", f"study={path}", "--out", str(out), "--store", str(out / "store"), *STUDY,
            *more, "--", *given, "marginal.num_blocks=2", "marginal.seq_len=64",
            "pruning.keep_multiple=1", "pruning.core_pos_top_m=1",
        ]
    )  # fmt: skip
    found: dict[str, Any] = json.loads((out / "study.json").read_text())
    return found


@pytest.fixture(scope="module")
def study_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("study")


def test_study(world: World, study_folder: Path) -> None:
    """Two calls are one study; weights of 1 are REAP sum; intervals are of what plans lost."""
    methods = ("greedy", "EAFT-REAP, sizes by marginal loss")
    first = studied(world, study_folder, "--methods", *methods)
    found = studied(world, study_folder, "--methods", "random")
    assert {one["method"] for one in found["plans"]} == {
        *(one["method"] for one in first["plans"]), "random",
    }  # fmt: skip
    plans = {(one["method"], one["seed"], one["keep_n"]): one for one in found["plans"]}
    assert {keep_n for *_, keep_n in plans} == {6, 4}
    for (method, seed, keep_n), one in plans.items():
        plain = plans["REAP sum", seed, keep_n]
        assert (one["moved"] == 0) == (one["plan"] == plain["plan"])
        if method == "w_conflict 1, w_uncertain 1":
            assert one["plan"] == plain["plan"]
    for one in found["apart"]:
        other = one["reference"]
        apart = [
            plans[one["method"], seed, one["keep_n"]]["dnll"]
            - (plans[other, seed, one["keep_n"]]["dnll"] if other else 0.0)
            for seed in (0, 1)
        ]
        assert one["mean"] == pytest.approx(np.mean(apart), abs=2e-6)
        assert (
            one["reach"]
            >= one["seeds"]
            == pytest.approx(12.706 * np.std(apart, ddof=1) / 2**0.5, rel=1e-3, abs=2e-5)
        )


def test_study_tables(world: World, study_folder: Path, tmp_path: Path) -> None:
    """Every size is a row of the summary, every method one of the full tables."""
    if not (study_folder / "study.json").exists():
        studied(world, study_folder, "--methods", "greedy")
    tables = script("study_tables")
    main = tables.main
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- study: begin -->\nold\n<!-- study: end -->\nafter\n")
    shipped = BENCHMARKS / "study"
    text = main([str(shipped), "--summary", str(page)])
    before, _, *lines, _, after = page.read_text().splitlines()
    assert (before, after) == ("before", "after")
    assert lines == text.splitlines()[: len(lines)]
    for file in shipped.glob("*.json"):
        study = json.loads(file.read_text())
        for keep_n in study["keep"]:
            assert any(line.startswith(f"| {study['model']} | {keep_n} |") for line in lines)
    study = json.loads((study_folder / "study.json").read_text())
    assert "| greedy |" in tables.full(study)
    assert tables.percent(math.log(1.1), 0.0) == "+10.00 ± 0.00"


def test_parallel_throughput(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes; that they equal one is compared inside."""
    main = script("parallel_throughput").main
    sizes = ["--model", "tiny", "--device", "cpu", "--seq-len", "32", "--batch", "2"]

    def rank(number: int) -> int:
        os.environ |= {"RANK": str(number), "MASTER_PORT": port}
        torch.set_num_threads(1)
        found = main(sizes)
        assert sorted(found) == ["score", "trace"]
        assert all(0 < times < math.inf for times in found.values())
        return 0

    port = free_port()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    first, second = (fork(lambda n=n: rank(n), fresh_directory(tmp_path)) for n in (0, 1))
    assert first.wait() == 0, first.text
    second.wait()  # ends by SystemExit(0), which a fork reports as it reports any exception
    assert "2 processes equal one to the last bit" in first.text


def free_port() -> str:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


PEER_PYTHON = os.environ.get("EAFT_LLMCOMPRESSOR_PYTHON")
SMALL_PEERS = ["--blocks", "8", "--eval-blocks", "8", "--seq-len", "64", "--keep-n", "6"]


@pytest.fixture(scope="module")
def qwen3(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A qwen3_moe that reads harmony, and settings that name the tiny packs."""
    path = tiny.write_moe(tmp_path_factory.mktemp("qwen3") / "model", "qwen3_moe", fused=False)
    tiny.write_tokenizer(path)
    left_out = ("model", "eval.num_blocks", "profile.num_blocks", "pruning.keep_n")
    given = [a for a in inputs(world) if not a.startswith(left_out)]
    return path, [*given, "pruning.keep_multiple=1", "pruning.core_pos_top_m=1"]


def test_peers(
    qwen3: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without llm-compressor; a checkpoint with one other bit is told from the base's."""
    peers, (model, given) = script("peers"), qwen3
    page = tmp_path / "page.md"
    page.write_text("<!-- peers: begin -->\n<!-- peers: end -->\n")
    rows = peers.main(
        ["--model", str(model), *SMALL_PEERS, "--write", str(page), "--", *given],
    )
    assert [row[:2] for row in rows] == [
        ["all", "transformers' forward, float32"],
        *(["6", f"ours, {name}"] for name in (peers.EVERY, *peers.OURS)),
    ]
    assert {row[-1] for row in rows[1:]} == {"yes"}
    assert "llm-compressor was left out" in capsys.readouterr().out
    assert page.read_text().count("\n| 6 |") == 4
    whole = peers.tensors(model)
    plan = KeepPlan((tuple(range(8)),) * 2, 8)
    copy = peers.Pruned("", 8, model, plan, {})
    assert peers.same_weights(whole, copy, [0, 1])
    peers.bits(whole["model.layers.1.mlp.experts.down_proj"])[7, 0, 0] ^= 1
    assert not peers.same_weights(whole, copy, [0, 1])


def test_peers_floor(qwen3: tuple[Path, list[str]], tmp_path: Path) -> None:
    np.save(tmp_path / "tokens.npy", script("common").random_blocks(4, 16, 300).ids_BS)
    found = script("peers_floor").main(
        [str(qwen3[0]), str(tmp_path / "tokens.npy"), "--started", str(time.time())]
    )
    assert 0 < found["choosing"] < found["cpu"]
    assert 0 < found["seconds"] < math.inf
    assert 0 < found["peak_gb"] < math.inf


def test_peers_ours(qwen3: tuple[Path, list[str]], tmp_path: Path) -> None:
    """Each method and size is a checkpoint; its forwards count in each, as if it came alone."""
    model, given = qwen3
    methods = ["REAP mean", "frequency"]
    found = script("peers_ours").main(
        [
            "--started", str(time.time()), "--home", str(tmp_path), "--keep-n", "6", "4",
            "--methods", *methods, "--", "model=local", f"model.path={model}", *given,
        ]
    )  # fmt: skip
    assert [(one["method"], one["keep_n"]) for one in found] == [
        (method, keep_n) for method in methods for keep_n in (6, 4)
    ]
    for one in found:
        config = json.loads((Path(one["path"]) / "config.json").read_text())
        assert {len(ids) for ids in one["kept"]} == {one["keep_n"]} == {config["num_experts"]}
        assert 0 < one["choosing"] < one["cpu"]
        assert 0 < one["seconds"] < math.inf


@pytest.mark.server
@pytest.mark.skipif(not PEER_PYTHON, reason="EAFT_LLMCOMPRESSOR_PYTHON names no interpreter")
def test_peers_llmcompressor(qwen3: tuple[Path, list[str]]) -> None:
    """With a mask, in the whole model, it chooses as we do by the formula over every token."""
    peers, (model, given) = script("peers"), qwen3
    rows = peers.main(
        ["--model", str(model), "--peer-python", PEER_PYTHON, *SMALL_PEERS, "--", *given]
    )
    of = {row[1]: row for row in rows}
    assert {row[-1] for row in rows[1:]} == {"yes"}
    assert of[f"ours, {peers.EVERY}"][4].endswith(", 0")
    assert of[peers.THEIRS][4].startswith("0, ")
    assert of[peers.THEIRS][3] == ""


def test_random_checkpoint(tmp_path: Path) -> None:
    out = tmp_path / "model"
    written = script("random_checkpoint").main(
        ["--out", str(out), "--model", "tiny", "--experts", "6"]
    )
    hidden, inner, experts, q, kv, vocab = 128, 64, 6, 4 * 16, 2 * 16, 512
    attention = 2 * (hidden * q + hidden * kv) + 2 * q + 2 * kv - q + hidden + 4  # and sinks
    norms, router = 2 * hidden, experts * (hidden + 1)
    mxfp4 = experts * (2 * inner * hidden + hidden * inner) * 17 // 32
    biases = experts * (2 * inner + hidden)
    layer = 2 * (attention + norms + router + biases) + mxfp4
    assert written == 2 * layer + 2 * (2 * vocab * hidden + hidden)
    files = open_model(out)
    assert files.weight_bytes == written
    blocks = script("common").random_blocks(2, 16, vocab)
    scores = load_files(files, options(device="cpu")).score(blocks, lambda tokens: None)
    assert np.isfinite(scores.logp_T).all()


def test_random_model() -> None:
    """Unpacked it computes what it did, to the last bit."""
    random_model = script("random_model")
    files = random_model.random_files("tiny")
    model = random_model.random_model(files, torch.device("cpu"))
    blocks = script("common").random_blocks(2, 32, 512)
    engine = random_model.engine_of(model, files, 64)
    packed = engine.score(blocks, lambda tokens: None).logp_T
    random_model.unpack(model)
    dense = engine.score(blocks, lambda tokens: None).logp_T
    assert np.array_equal(packed, dense)
    assert len(np.unique(packed)) > 10


def test_refine(world: World) -> None:
    found = script("refine").main(
        [
            "--evaluations", "5", "--keep", "4", "--down-to", "4", "--seeds", "0",
            "--start", "EAFT-REAP", "--blocks", "4", "--seq-len", "64", "--", *inputs(world),
            "marginal.num_blocks=2", "marginal.seq_len=64",
        ]
    )  # fmt: skip
    (start, _), (swapped, _), (evolved, _) = found
    assert max(swapped, evolved) <= start  # on the blocks that were searched


def test_runs(world: World, tmp_path: Path) -> None:
    """A run that ends well leaves its result; of one that does not the error is told."""
    runs = script("runs")
    found = runs.finished([*inputs(world), "task=prune"], tmp_path)
    assert [len(kept) for kept in found["plan"]["kept"]] == [4, 4]
    with pytest.raises(RuntimeError, match=r"(?s)exit code 2.*\nerror: .*keep_n"):
        runs.finished([*inputs(world), "pruning.keep_n=99"], tmp_path)
    assert runs.n_experts(inputs(world)) == 8


def test_sglang_gpu(world: World, tmp_path: Path) -> None:
    """Every step, against a stand-in server; a step that failed says so."""
    other, data = tmp_path / "other environment", tmp_path / "data"
    (other / "sglang").mkdir(parents=True)
    (other / "sglang" / "launch_server.py").write_text(
        "from support.sglang_standin import main\nif __name__ == '__main__': main()\n"
    )
    path = f"{other}:{REPOSITORY / 'tests'}:{REPOSITORY / 'src'}"
    python = other / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{path}" exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    (data / "blocks").mkdir(parents=True)
    save(data / "blocks", script("common").random_blocks(4, 24, 300))
    (data / "plan.json").write_text(
        json.dumps({"kept": [[0, 1, 2, 3], [1, 2, 3, 5]], "n_experts": 8})
    )
    found: dict[str, Any] = script("sglang_gpu").main(
        [
            "--python", str(python), "--data", str(data), "--out", str(tmp_path / "out"),
            "--work", str(tmp_path / "work"), "--seconds", "90", "--model", str(world.model),
            "--shape", "tiny", "--shrink", "64", "--served", "base", "keep16",
        ]
    )  # fmt: skip
    steps = {name: facts for name, facts in found.items() if name != "seconds"}
    assert {name for name, facts in steps.items() if "error" in facts} == set()
    assert {"parity, demo keep24", "usage, demo base", "20b keep16 is up"} <= set(steps)
    tokens = 4 * 24 * 2  # blocks, length, top-k
    assert steps["usage, demo base"]["selections_a_layer"] == [tokens, tokens]
    medians = [facts for name, facts in steps.items() if name.endswith("medians")]
    assert len(medians) == 4
    for row in (row for facts in medians for row in facts["rows"]):
        assert 0 < row["total_tokens_s"] < math.inf
    assert (tmp_path / "out" / "sglang_gpu.json").is_file()
    assert "=== " in (tmp_path / "out" / "servers.log").read_text()


def test_sglang_steps(tmp_path: Path) -> None:
    """A step that fails, or comes too late, is written down and the next one runs."""
    steps = script("sglang_steps").Steps(tmp_path, 100)
    with steps.step("bad"):
        raise ValueError("broken")
    with steps.step("late"):
        steps.require(1000)
    with steps.step("good") as facts:
        facts["value"] = 1
    found = json.loads((tmp_path / "sglang_gpu.json").read_text())
    assert found["bad"] == {"error": "ValueError: broken"}
    assert found["late"]["error"].startswith("TimeoutError")
    assert found["good"] == {"value": 1}


def test_sglang_gpu_sh() -> None:
    file = BENCHMARKS / "sglang_gpu.sh"
    subprocess.run(["bash", "-n", file], check=True)
    done = subprocess.run(["bash", file], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "sglang_gpu.sh install DIR" in done.stdout


def test_sweeps_and_search(world: World) -> None:
    found = script("sweeps_and_search").main(
        ["--parts", "scoring", "kill", *SMALL_RUNS, "--killed-trials", "4", "--", *inputs(world)]
    )
    assert set(found) == {"scoring", "kill"}
    assert 0 < found["scoring"] < math.inf
    kept, trials = found["kill"]
    assert 1 <= kept <= trials == 4


@pytest.mark.slow
def test_sweeps_and_search_of_a_grid(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    found = script("sweeps_and_search").main(
        [
            "--parts", "grid", "search", *SMALL_RUNS, "--cold", "1", "--trials", "4", "--",
            *inputs(world),
        ]
    )  # fmt: skip
    together, apart = found["grid"]
    assert 0 < together < apart
    assert 0 < found["search"] < math.inf
    printed = capsys.readouterr().out
    assert "grid: 25 points in one multirun" in printed
    assert "same plan and verdict: True" in printed
