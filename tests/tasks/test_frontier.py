"""task=frontier on a tiny model: what is tried, what is proven, on which rows, and what it says."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
from mlflow import MlflowClient
from support.runs import Done, World, tree

from eaft_prune.core.store import load
from eaft_prune.core.types import Blocks, TokenScores

pytest_plugins = ("support.worlds",)

ASKED = (
    "task=frontier",
    "pruning.keep_multiple=2",
    "pruning.core_pos_top_m=0",
    "frontier.num_blocks=all",
    "frontier.greedy_blocks=1",
    "marginal.seq_len=64",
    "compensation.num_blocks=24",
    "compensation.passes=1",
    "eval.num_blocks=all",
    "eval.seed=0",
    "eval.kl_top_k=null",
    # a random model loses much: what passes with 6 experts of 8, and does not with 4 but repaired
    "gate.max_dppl=1000",
    "gate.max_dppl_relative=0.3",
    "gate.max_dcc_rate=1",
    "gate.max_dmean_prob=1",
    "gate.max_js2d=1",
)


@pytest.fixture(scope="module")
def own(world: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    """The shared model and packs, a store of this module's."""
    return world.elsewhere(tmp_path_factory.mktemp("frontier"))


@pytest.fixture(scope="module")
def found(own: World) -> Done:
    done = own.run(*ASKED)
    assert done.code == 0, done.out + done.err
    return done


def points(done: Done) -> pandas.DataFrame:
    (path,) = [p for p in done.cwd.rglob("frontier.csv") if "artifacts" not in p.parts]
    return pandas.read_csv(path)


def test_methods_are_tried_in_turn_and_each_only_below_what_passed(found: Done) -> None:
    tried = points(found)
    searched = tried[tried.rows == "search"]
    passed = {
        method: min(of.keep_n[of.holds], default=math.inf)
        for method, of in searched.groupby("method", sort=False)
    }
    assert passed["ranking"] == 6  # else the next lines say nothing
    assert not (searched.method.eq("repaired") & searched.keep_n.ge(passed["ranking"])).any()
    # the best and its neighbours are measured by every method that needs no repair
    best = min(passed.values())
    for method in ("ranking", "greedy"):
        sizes = set(searched.keep_n[searched.method == method])
        assert {n for n in (4, 6) if abs(n - best) <= 2} <= sizes


def test_the_answer_is_the_smallest_that_was_proven(found: Done) -> None:
    tried, result = points(found), found.result
    proof = tried[tried.rows == "proof"]
    assert list(proof.keep_n) == sorted(proof.keep_n, reverse=True)
    (answer,) = proof[proof.verdict == "PASS"].itertuples()
    assert answer.keep_n == proof.keep_n.max()  # larger ones are not tried once one has passed
    assert result["facts"]["keep_n"] == answer.keep_n
    manifest = json.loads((Path(result["checkpoint"]["path"]) / "manifest.json").read_text())
    assert {len(ids) for ids in manifest["plan"]["kept"]} == {answer.keep_n}
    assert result["checkpoint"]["path"] == answer.path
    # the gate's chance of error is shared out over the sizes that could be proven
    passed = tried.keep_n[(tried.rows == "search") & tried.holds].min()
    provable = sum(n >= passed for n in (4, 6))
    assert result["gate"]["confidence"] == pytest.approx(1 - 0.05 / provable)
    assert f"keeps {answer.keep_n} of 8 experts" in result["facts"]["sentence"]
    assert result["facts"]["sentence"] in found.out
    size = sum(p.stat().st_size for p in Path(answer.path).glob("*.safetensors"))
    assert 0 < size - answer.gb * 1e9 < 40_000  # headers beside the tensors


def test_what_is_proven_was_never_searched_on(own: World, found: Done) -> None:
    rows: dict[str, set[bytes]] = {"profile": set(), "eval": set()}
    for stage in found.result["stages"]:
        if stage["stage"].startswith("pack/"):
            blocks = load(own.store / "pack" / stage["key"], Blocks)
            texts = blocks.ids_BS.ravel()
            (at,) = np.nonzero(np.diff(blocks.row_BS.ravel(), prepend=-2))
            whole = [part.tobytes() for part in np.split(texts, at) if len(part) > 40]
            rows[stage["stage"].split("/")[1]] |= set(whole)
    assert len(rows["profile"]) > 10
    assert len(rows["eval"]) > 10
    assert not rows["profile"] & rows["eval"]


def test_a_searched_size_is_what_its_saved_scores_say(own: World, found: Done) -> None:
    tried = points(found)
    point = tried[(tried.method == "ranking") & (tried.keep_n == 4)].iloc[0]
    saved: dict[str, list[Any]] = {"base": [], "ranking-4": []}
    for stage in found.result["stages"]:
        name = stage["stage"].split("/")
        if name[0] == "evaluate" and name[1] in saved and len(name) == 5:
            scores = load(own.store / "evaluate" / stage["key"], TokenScores)
            saved[name[1]].append((int(name[4].split("-")[0]), scores.logp_T.astype(np.float64)))
    parts = {name: dict(of) for name, of in saved.items()}
    shared = parts["ranking-4"]
    base, mine = (np.concatenate([parts[n][first] for first in shared]) for n in parts)
    assert len(base) == point.tokens
    assert point.dppl_percent == pytest.approx(
        100 * math.expm1(base.mean() - mine.mean()), abs=1e-6
    )


def test_a_second_run_measures_nothing_and_says_the_same(own: World, found: Done) -> None:
    again = own.run(*ASKED)
    assert again.code == 0, again.out + again.err
    assert [s["stage"] for s in again.result["stages"] if not s["cached"]] == []
    assert again.result["facts"] == found.result["facts"]
    pandas.testing.assert_frame_equal(points(again), points(found))


def test_mlflow_has_a_child_for_every_searched_size(own: World, found: Done) -> None:
    client = MlflowClient(tracking_uri=own.uri)
    parent = client.get_run(found.result["mlflow_run_id"])
    runs = client.search_runs(
        [parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    )
    logged = {
        (run.data.params["method"], int(run.data.params["pruning.keep_n"])): (
            run.data.tags["gate.status"],
            pytest.approx(run.data.metrics["summary/dppl_percent"]),
            pytest.approx(run.data.metrics["summary/gb"]),
            run.data.metrics["summary/tokens"],
        )
        for run in runs
    }
    tried = points(found)
    searched = tried[tried.rows == "search"]
    assert logged == {
        (p.method, p.keep_n): (p.verdict, p.dppl_percent, p.gb, p.tokens)
        for p in searched.itertuples()
    }
    (proven,) = tried[(tried.rows == "proof") & (tried.verdict == "PASS")].itertuples()
    assert parent.data.metrics["summary/gb"] == pytest.approx(proven.gb)
    assert parent.data.metrics["summary/tokens"] == proven.tokens
    names = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert {"frontier.html", "frontier.md", "frontier.csv"} <= names


def test_plan_only_says_what_it_would_take_and_evaluates_nothing(own: World, found: Done) -> None:
    """Of the one size that is at most as large as asked for."""
    fresh = own.elsewhere(own.home / "planned")
    gigabytes = points(found).groupby("keep_n").gb.max()
    between = (gigabytes[4] + gigabytes[6]) / 2
    said = fresh.run(*ASKED, "sweep.plan_only=true", f"frontier.target_gb={between}")
    assert said.code == 0, said.err
    assert "sizes 4 of 8 experts a layer" in said.out
    assert "greedy: losses by masking" in said.out
    assert not list(fresh.store.glob("evaluate/*"))
    assert not fresh.checkpoints.exists()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("packs.split=none", "packs.split=hash"),
        ("pruning.compensation=bias", "frontier.repair"),
        ("frontier.ladder=[repaired]", "put ranking before it"),
        ("frontier.ladder=[greedy,ranking]", "in the order"),
        ("pruning.selection=coverage", "pruning.selection=uniform"),
    ],
)
def test_what_it_cannot_do_is_refused_before_anything_runs(
    own: World, override: str, said: str
) -> None:
    assert said in own.run(*ASKED, "export.pad_ragged=true", override).refused()


def test_sizes_that_are_not_there_are_refused(own: World) -> None:
    assert "give more" in own.run(*ASKED, "frontier.target_gb=1e-6").failed()


def test_a_checkpoint_made_elsewhere_is_judged_as_the_same_one_of_ours(
    own: World, found: Done, tmp_path: Path
) -> None:
    """Rivals and task=candidate: the exported checkpoint, called something else."""
    ours = Path(found.result["checkpoint"]["path"])
    common = [s for s in ASKED if not s.startswith(("task=", "frontier."))]
    before = tree(ours)
    judged = own.run("task=candidate", *common, f"candidate.path={ours}", "candidate.name=theirs",
                     "gate.confidence=0.975")  # fmt: skip
    assert judged.code == 0, judged.err
    assert judged.result["gates"]["theirs"] == found.result["gates"]["pruned"]
    assert judged.result["reports"]["theirs"] == found.result["reports"]["pruned"]
    assert tree(ours) == before


def test_a_plan_made_elsewhere_is_exported_and_judged(own: World, tmp_path: Path) -> None:
    kept = [[0, 3, 5, 6], [1, 2, 4, 7]]
    report = tmp_path / "report.json"
    report.write_text(json.dumps({f"model.layers.{i}.mlp": ids for i, ids in enumerate(kept)}))
    done = own.run("task=candidate", "eval.kl_top_k=null", f"candidate.plan={report}")
    assert done.code == 0, done.out + done.err
    manifest = Path(done.result["checkpoint"]["path"]) / "manifest.json"
    assert json.loads(manifest.read_text())["plan"]["kept"] == kept
    assert set(done.result["gates"]) == {"candidate"}


def test_rivals_stand_in_the_same_table(own: World, found: Done) -> None:
    """The checkpoint of the answer as a rival of itself; a name twice is refused."""
    ours = Path(found.result["checkpoint"]["path"])
    done = own.run(*ASKED, f"frontier.rivals=['{ours}']")
    assert done.code == 0, done.out + done.err
    proof = points(done).query("rows == 'proof'").set_index("method")
    rival, answer = proof.loc[ours.name], proof[proof.path == str(ours)].iloc[0]
    for column in ("gb", "verdict", "dppl_percent", "low_percent", "tokens", "conversations"):
        assert rival[column] == answer[column], column
    assert set(done.result["gates"]) == {"pruned", ours.name}
    twice = own.run(*ASKED, f"frontier.rivals=['{ours}', '{ours}']").failed()
    assert "two models" in twice
