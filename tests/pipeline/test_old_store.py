"""A store that the commit before the rooms made is read by this one: only packs are cut anew.

Their stage is of a higher version, as the old reader could serve another file's rows under a pack's
key. What depends on blocks is keyed by the digest of their bytes, not by the key they were stored
under: the new reader cuts the same blocks from these packs, so every other key is as it was.
Exports keep key and bytes, and are written once more: their names now tell bases of one name apart.
But for the compensated one, whose stage now solves another way and is of a higher version too.

tests/data/store_0.tar.xz holds a model, its packs, the store and the exports of the runs below, and
the lock of the first, all written by commit 61141cb.
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.runs import REPOSITORY, World

from eaft_prune.maths.metrics import DIVERGENCE
from eaft_prune.stages.pack import VERSION

pytestmark = pytest.mark.process

SHORT = ("eval.num_blocks=4",)
LOSSES = ("task=profile", "marginal.num_blocks=8", "marginal.seq_len=32", "pruning.keep_n=4")
RUNS = {
    "pipeline": ("eval.packs=null", "eval.seq_lens=[32,64]", "gate.seq_lens=[32,64]"),
    "compensated": (*SHORT, "pruning.compensation=experts", "compensation.num_blocks=80"),
    "top_k": ("eval.top_k=1", "eval.candidates=[masked]"),
    "interim": (
        *("eval.early_stop=true", "eval.num_blocks=40", "eval.seq_lens=[32]", "gate.seq_lens=[32]"),
        *("eval.seed=0", "profile.early_stop=true", "profile.early_stop_first_blocks=4"),
    ),
    "noise_floor": (*SHORT, "task=noise_floor"),
    "noop": (*SHORT, "task=noop"),
    "greedy": (*LOSSES, "pruning=greedy"),
    "elimination": (
        *(*LOSSES, "pruning=leave_one_out", "pruning.core_pos_top_m=0"),
        *("marginal.early_stop=true", "marginal.early_stop_confidence=0.9"),
    ),
    "layers": (
        *(*LOSSES, "pruning.selection=marginal_loss", "pruning.keep_multiple=2"),
        "pruning.core_pos_top_m=0",
    ),
    "stability": ("task=stability", "stability.resamples=20", "stability.seeds=[1,2]"),
    "ablate": ("task=ablate",),
}
NOT_KEYED = ("inspect/",)  # by time and place of the files, which unpacking changes
CUT_ANEW = ("pack/",)
ANEW = {
    "interim": ("evaluate/base/UNION/32/", "evaluate/pruned/UNION/32/"),  # of random blocks now
    "compensated": ("compensate", "evaluate/pruned"),  # of a higher version, on purpose
    "top_k": ("evaluate/masked_top1/",),  # was asked for with eval.top_logprobs
}
WRITTEN_ANEW = ("export",)
LATER_NUMBERS = {metric.name for metric in DIVERGENCE}
LATER = ("divergence/", "coverage", "passages/", "compare")  # stages that there were not


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> World:
    home = tmp_path_factory.mktemp("old")
    with tarfile.open(REPOSITORY / "tests" / "data" / "store_0.tar.xz") as archive:
        archive.extractall(home, filter="data")
    packs = {name: home / f"{name}.parquet" for name in ("alpha", "beta", "gamma")}
    return World(home, home / "model", packs, f"sqlite:///{home}/mlruns/mlflow.db")


@pytest.mark.parametrize("name", RUNS)
def test_nothing_is_made_again(old: World, name: str) -> None:
    done = old.run(*RUNS[name])
    assert done.code == 0, done.out + done.err
    stages = [s for s in done.result["stages"] if not s["stage"].startswith(NOT_KEYED)]
    assert len(stages) >= 3
    anew = [s["stage"] for s in stages if not s["cached"]]
    known = (*CUT_ANEW, *WRITTEN_ANEW, *LATER, *ANEW.get(name, ()))
    assert [stage for stage in anew if not stage.startswith(known)] == []


def test_packs_are_cut_anew_and_are_the_old_blocks(old: World) -> None:
    """Byte by byte: each of the new outputs has the files of an old one."""
    assert old.run(*RUNS["pipeline"]).code == 0
    outputs: dict[int, list[str]] = {}
    for path in old.store.glob("pack/*/record.json"):
        record = json.loads(path.read_text())
        outputs.setdefault(record["identity"]["version"], []).append(str(record["files"]))
    (first, second) = sorted(outputs)
    assert (first, second) == (1, VERSION)
    assert set(outputs[second]) <= set(outputs[first])
    assert len(outputs[second]) >= 8  # three packs and UNION at two lengths


@pytest.mark.parametrize("name", ["pipeline", "noop"])
def test_an_export_under_its_new_name_is_the_old_one(old: World, name: str) -> None:
    done = old.run(*RUNS[name])
    made = Path(done.result["checkpoint"]["path"])
    base = json.loads((made / "manifest.json").read_text())["base"]["digest"]
    before = made.with_name(made.name.replace(f"-{base[:8]}", "", 1))
    assert before != made
    manifests = [json.loads((path / "manifest.json").read_text()) for path in (before, made)]
    for part in ("key", "digest", "files", "plan"):
        assert manifests[0][part] == manifests[1][part], part


def test_a_search_evaluates_no_chunk_again(old: World, tmp_path: Path) -> None:
    """Its trials draw the same plans, whose token scores are there."""
    there = set(old.store.glob("evaluate/*/record.json"))
    done = old.run(
        *("task=search", "search.n_trials=6", "search.num_blocks=6", "search.chunk_blocks=2"),
        *("search.seq_len=64", f"search.storage=sqlite:///{tmp_path}/study.db"),
    )
    assert done.code == 0, done.out + done.err
    assert set(old.store.glob("evaluate/*/record.json")) == there


def plain(metrics: dict[str, Any]) -> dict[str, Any]:
    """Every number but those that conversations are counted for, which were blocks."""
    return {
        f"{label}/{pack}/{seq_len}/{name}": value
        for label, packs in metrics.items()
        for pack, lengths in packs.items()
        for seq_len, values in lengths.items()
        for name, value in values.items()
        if name not in ("js2d_corrected", "rows", "kl_top", "top1_agreement", *LATER_NUMBERS)
    }


def test_the_lock_says_what_the_run_says_now(old: World) -> None:
    locked = yaml.safe_load((old.home / "lock" / "run.lock.yaml").read_text())
    done = old.run(*RUNS["pipeline"])
    (path,) = done.cwd.rglob("run.lock.yaml")
    now = yaml.safe_load(path.read_text())
    for part in ("plan", "checkpoint"):
        assert now["outputs"][part] == locked["outputs"][part], part
    assert plain(now["outputs"]["metrics"]) == plain(locked["outputs"]["metrics"])
    statuses = [
        {label: found["plain_status"] for label, found in outputs["gates"].items()}
        for outputs in (now["outputs"], locked["outputs"])
    ]
    assert statuses[0] == statuses[1]
    left_out = (*NOT_KEYED, *CUT_ANEW)
    keys = {k: v for k, v in locked["keys"].items() if not k.startswith(left_out)}
    assert {"profile", "export"} <= set(keys)
    assert {k: now["keys"].get(k) for k in keys} == keys
