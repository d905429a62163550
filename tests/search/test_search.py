"""task=search on tiny checkpoints: resuming, stopping, objectives, spaces, storages, workers."""

from __future__ import annotations

import html
import json
import math
import re
import shlex
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from mlflow import MlflowClient
from optuna.storages.journal import JournalFileBackend
from scipy import stats
from support.devtools import CHROMIUM, Page
from support.runs import Done, World

from eaft_prune.config import SearchSettings
from eaft_prune.core.store import load
from eaft_prune.core.types import Blocks, TokenScores
from eaft_prune.search.stopping import above_zero

pytest_plugins = ("support.worlds",)

pytestmark = pytest.mark.dear

SMALL = (
    "task=search",
    "search.n_trials=6",
    "search.seq_len=64",
    "search.num_blocks=8",
    "search.chunk_blocks=2",
)
# many plans, none of them better for a reason: every seed draws other experts
RANDOM = (
    "pruning=random",
    "pruning.core_pos_top_m=0",
    "search.space={pruning.seed: {low: 0, high: 99}}",
)


def search(world: World, home: Path, *overrides: str) -> Done:
    """A search whose study is in `home`."""
    return world.run(*SMALL, f"search.storage=sqlite:///{home}/optuna.db", *overrides)


def trials(home: Path, storage: Any = None) -> list[optuna.trial.FrozenTrial]:
    """All trials of the one study in `home`."""
    storage = storage or f"sqlite:///{home}/optuna.db"
    (name,) = optuna.get_all_study_names(storage)
    return optuna.load_study(study_name=name, storage=storage).trials


def facts(done: Done) -> dict[str, Any]:
    assert done.code == 0, done.out + done.err
    found = done.result["facts"]
    assert isinstance(found, dict)
    return found


def evaluations(world: World) -> set[str]:
    """Every evaluation in the store."""
    return {path.parent.name for path in world.store.glob("evaluate/*/record.json")}


def record(world: World, key: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((world.store / "evaluate" / key / "record.json").read_text())
    return value


def scores_by_mask(world: World) -> dict[str, list[TokenScores]]:
    """Token scores of each plan ('' is the base) over the search's chunks, in block order."""
    found: dict[str, list[tuple[int, TokenScores]]] = {}
    for key in evaluations(world):
        identity = record(world, key)["identity"]
        if chunk := identity["settings"].get("chunk"):
            scores = load(world.store / "evaluate" / key, TokenScores)
            found.setdefault(identity["inputs"]["mask"], []).append((chunk[0], scores))
    return {
        mask: [s for _, s in sorted(parts, key=lambda p: p[0])] for mask, parts in found.items()
    }


@pytest.fixture(scope="module")
def own(world: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    """The shared model and packs, a store of this module's."""
    return world.elsewhere(tmp_path_factory.mktemp("search"))


@pytest.fixture(scope="module")
def whole(own: World) -> Done:
    """An uninterrupted search without early stopping."""
    done = search(own, own.home, *RANDOM, "search.early_stop=false")
    assert done.code == 0, done.out + done.err
    return done


def test_the_winner_is_exported_and_gated_on_rows_that_the_search_never_saw(
    own: World, whole: Done
) -> None:
    result = whole.result
    found = facts(whole)
    assert (found["trials"], found["trials_now"], found["trials_failed"]) == (6, 6, 0)
    complete = trials(own.home)
    assert [t.state.name for t in complete] == ["COMPLETE"] * 6
    best = min(complete, key=lambda t: t.value or 0)
    assert found["best_trial"] == best.number
    assert found["best_settings"] == best.params
    assert result["plan"]["digest"] == best.user_attrs["plan"]
    manifest = json.loads((Path(result["checkpoint"]["path"]) / "manifest.json").read_text())
    assert manifest["plan"]["kept"] == json.loads(best.user_attrs["kept"])
    assert manifest["pruning"]["seed"] == best.params["pruning.seed"]
    assert set(result["reports"]) == {"base", "pruned"}
    assert result["gate"]["checks"]
    # rows: what is gated is of the eval part, what was searched and profiled of the other
    texts: dict[str, set[str]] = {"profile": set(), "eval": set()}
    for stage in result["stages"]:
        if stage["stage"].startswith("pack/"):
            blocks = load(own.store / "pack" / stage["key"], Blocks)
            texts[stage["stage"].split("/")[1]].add(blocks.rows_digest)
    assert len(texts["profile"]) == 2  # the trace's and the search's
    assert len(texts["eval"]) == 1
    assert not texts["profile"] & texts["eval"]


def test_the_winners_settings_can_be_pasted(own: World, whole: Done) -> None:
    """They give the winner's plan without a search."""
    (line,) = [line for line in whole.out.splitlines() if line.startswith("best settings")]
    overrides = shlex.split(line.removeprefix("best settings"))
    again = own.run("task=profile", *RANDOM[:2], *overrides)
    assert again.code == 0, again.err
    assert again.result["plan"] == whole.result["plan"]


def test_mlflow_and_the_report_show_how_the_winner_was_made(own: World, whole: Done) -> None:
    """Not the settings that the search started from."""
    best = trials(own.home)[facts(whole)["best_trial"]]
    seed = best.params["pruning.seed"]
    assert seed != 0  # the configured one
    client = MlflowClient(tracking_uri=own.uri)
    run = client.get_run(whole.result["mlflow_run_id"])
    (written,) = run.outputs.model_outputs
    params = client.get_logged_model(written.model_id).params
    assert params["pruning.seed"] == str(seed)
    assert params["pruning.keep_n"] == "4"
    assert params["criterion"] == "random"
    assert params["plan.digest"] == best.user_attrs["plan"]
    (base,) = run.inputs.model_inputs
    assert not [k for k in client.get_logged_model(base.model_id).params if "pruning" in k]
    (page,) = [p for p in whole.cwd.rglob("report.md") if "artifacts" not in p.parts]
    assert re.search(rf"seed\W+{seed}\b", page.read_text())


def test_objective_and_constraints_equal_a_computation_from_the_saved_scores(
    own: World, whole: Done
) -> None:
    from eaft_prune.maths.divergence import js2d_corrected

    saved = scores_by_mask(own)
    gate = {check["name"]: check["limit"] for check in whole.result["gate"]["checks"]}
    for trial in trials(own.home):
        base, mine = (
            np.concatenate([s.logp_T for s in saved[mask]]).astype(np.float64)
            for mask in ("", trial.user_attrs["plan"])
        )
        assert trial.value == pytest.approx(base.mean() - mine.mean(), abs=1e-12)
        assert trial.intermediate_values[4] == pytest.approx(trial.value, abs=1e-12)
        half = sum(len(s) for s in saved[""][:2])  # chunks have 2 blocks
        assert trial.intermediate_values[2] == pytest.approx(
            base[:half].mean() - mine[:half].mean(), abs=1e-12
        )
        ppl = math.exp(-base.mean()), math.exp(-mine.mean())
        dppl, dcc, dp, js = (
            trial.constraints[name] for name in ("dppl", "dcc_rate", "dmean_prob", "js2d")
        )
        assert dppl == pytest.approx(abs(ppl[1] - ppl[0]) - 0.25, abs=1e-9)
        relative = trial.constraints["dppl_relative"]
        assert relative == pytest.approx(abs(ppl[1] / ppl[0] - 1) - 0.05, abs=1e-9)
        assert dp == pytest.approx(
            abs(np.exp(mine).mean() - np.exp(base).mean()) - gate["dmean_prob"], abs=1e-9
        )
        joined = [
            TokenScores(
                np.concatenate([s.logp_T for s in saved[mask]]),
                np.concatenate([s.entropy_T for s in saved[mask]]),
                np.concatenate([s.block_T + 2 * i for i, s in enumerate(saved[mask])]),
            )
            for mask in ("", trial.user_attrs["plan"])
        ]
        apart = js2d_corrected(joined[0], joined[1], joined[0].block_T.astype(np.int64))
        assert js == pytest.approx(max(apart.value, 0) - gate["js2d"], abs=1e-12)
        assert dcc >= -gate["dcc_rate"]


def test_n_trials_is_the_total_and_a_second_call_runs_the_rest_of_the_same_search(
    own: World, whole: Done, tmp_path: Path
) -> None:
    """In the journal storage; the same trials as in SQLite."""
    before = evaluations(own)
    where = f"search.storage=journal:{tmp_path}/study.log"
    common = (*RANDOM, "search.early_stop=false", where)
    first = search(own, tmp_path, *common, "search.n_trials=2")
    assert (facts(first)["trials"], facts(first)["trials_now"]) == (2, 2)
    second = search(own, tmp_path, *common)
    assert (facts(second)["trials"], facts(second)["trials_now"]) == (6, 4)
    assert len({facts(done)["study"] for done in (whole, first, second)}) == 1
    storage = optuna.storages.JournalStorage(JournalFileBackend(f"{tmp_path}/study.log"))
    mine, wanted = trials(tmp_path, storage), trials(own.home)
    assert [t.params for t in mine] == [t.params for t in wanted]
    assert [t.values for t in mine] == [t.values for t in wanted]
    assert second.result["plan"] == whole.result["plan"]
    # all was in the store; nothing but the exports' evaluations could be new
    assert {
        k for k in evaluations(own) - before if "chunk" in record(own, k)["identity"]["settings"]
    } == set()


def test_a_plan_is_evaluated_once(own: World, tmp_path: Path) -> None:
    """One choice of settings, many trials: one evaluation."""
    before = evaluations(own)
    space = "search.space={pruning.seed: {choices: [1234]}, pruning.w_good: {low: 0, high: 1}}"
    done = search(own, tmp_path, *RANDOM[:2], space)
    assert facts(done)["distinct_plans"] == 1
    found = trials(tmp_path)
    assert len({t.user_attrs["plan"] for t in found}) == 1
    assert len({t.value for t in found}) == 1
    new = [record(own, key)["identity"] for key in evaluations(own) - before]
    masks = [i["inputs"]["mask"] for i in new if "chunk" in i["settings"]]
    assert masks == [found[0].user_attrs["plan"]] * 4  # once a chunk
    assert done.err.count("same plan as trial 0") + done.out.count("same plan as trial 0") in (0, 5)
    children = points(own, done)
    outcomes = [child.data.tags["trial.outcome"] for child in children]
    assert outcomes == ["evaluated", *["same plan as trial 0"] * 5]


def points(world: World, done: Done) -> list[Any]:
    """MLflow's child runs of a search, in trial order."""
    client = MlflowClient(tracking_uri=world.uri)
    parent = client.get_run(done.result["mlflow_run_id"])
    found = client.search_runs(
        [parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    )
    return sorted(found, key=lambda run: int(run.info.run_name.split()[1]))


def test_mlflow_has_a_child_a_trial_and_the_plots(own: World, whole: Done) -> None:
    children = points(own, whole)
    study = trials(own.home)
    assert len(children) == len(study)
    for child, trial in zip(children, study, strict=True):
        assert child.info.status == "FINISHED"
        assert child.data.params == {"pruning.seed": str(trial.params["pruning.seed"])}
        assert child.data.tags["plan.digest"] == trial.user_attrs["plan"]
        assert child.data.metrics["dnll"] == pytest.approx(trial.value)
    client = MlflowClient(tracking_uri=own.uri)
    files = {
        Path(f.path).name for f in client.list_artifacts(whole.result["mlflow_run_id"], "search")
    }
    assert files == {"trials.csv", "plots.html"}
    parent = client.get_run(whole.result["mlflow_run_id"])
    assert parent.data.tags["study"] == facts(whole)["study"]
    assert parent.data.metrics["values/distinct_plans"] == facts(whole)["distinct_plans"]


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium on PATH")
def test_plots_are_drawn_where_nothing_lies_beside_them(whole: Done, tmp_path: Path) -> None:
    """As MLflow shows an artifact: the file's text in a frame of another page."""
    (page,) = whole.cwd.rglob("search/plots.html")
    frame = tmp_path / "frame.html"
    frame.write_text(f'<iframe srcdoc="{html.escape(page.read_text())}"></iframe>')
    inside = "document.querySelector('iframe').contentDocument"
    with Page(tmp_path / "profile") as browser:
        browser.open(frame, plot=None)
        browser.wait(f"{inside}.querySelectorAll('.main-svg').length > 0")
        drawn = browser.js(
            f"Array.from({inside}.querySelectorAll('section')).filter("
            "(one) => one.querySelector('.main-svg')).map((one) => one.id).join(' ')"
        )
        assert browser.problems == []
    assert drawn.split() == ["history_dnll", "parallel_dnll", "importance_dnll"]


def test_early_stopping_finds_the_same_winner_and_marks_what_it_stopped(
    own: World, tmp_path: Path
) -> None:
    """keep_n 8 of 8 loses nothing; whoever comes after it cannot reach it."""
    space = "search.space={pruning.keep_n: {choices: [8, 2]}, pruning.seed: {low: 0, high: 9}}"
    common = (*RANDOM[:2], space, "pruning.keep_multiple=1", "search.n_trials=7")
    common = (*common, "search.sampler={name: RandomSampler, arguments: {seed: 3}}")
    patient, hasty = tmp_path / "patient", tmp_path / "hasty"
    all_of_it = search(own, patient, *common, "search.early_stop=false")
    stopped = search(own, hasty, *common, "search.early_stop_confidence=0.9")
    assert facts(all_of_it)["trials_stopped"] == 0
    assert facts(stopped)["trials_stopped"] > 0
    assert stopped.result["plan"] == all_of_it.result["plan"]
    assert facts(stopped)["best_values"] == facts(all_of_it)["best_values"] == {"dnll": 0}
    for slow, quick in zip(trials(patient), trials(hasty), strict=True):
        assert slow.params == quick.params
        if quick.state.name == "PRUNED":
            done = max(quick.intermediate_values)
            assert 2 <= done < 4  # never on fewer than 4 blocks
            assert quick.value == quick.intermediate_values[done]
            assert slow.value is not None
            assert slow.value > 0
            assert len(quick.constraints) == 5
        else:
            assert quick.values == slow.values
    outcomes = [child.data.tags["trial.outcome"] for child in points(own, stopped)]
    assert any(outcome.startswith("stopped after ") for outcome in outcomes)


def test_an_optuna_pruner_stops_trials_too(own: World, tmp_path: Path) -> None:
    done = search(
        own, tmp_path, *RANDOM, "search.early_stop=false",
        "search.pruner={name: ThresholdPruner, arguments: {upper: -10}}", "search.n_trials=3",
    )  # fmt: skip
    assert "no trial was finished" in done.failed()
    assert [t.state.name for t in trials(tmp_path)] == ["PRUNED"] * 3
    assert len(list(done.cwd.rglob("trials.csv"))) == 1


def test_replicates_are_other_blocks_and_the_objective_is_their_mean(
    own: World, whole: Done, tmp_path: Path
) -> None:
    done = search(
        own,
        tmp_path,
        *RANDOM,
        "search.seeds=[1,2]",
        "search.early_stop=false",
        "search.n_trials=2",
    )
    assert facts(done)["study"] != facts(whole)["study"]
    other = tmp_path / "other"
    alone = search(
        own, other, *RANDOM, "search.seeds=[2]", "search.early_stop=false", "search.n_trials=2"
    )
    assert facts(alone)["trials"] == 2
    both, one, two = trials(tmp_path), trials(own.home)[:2], trials(other)
    for mean, first, second in zip(both, one, two, strict=True):
        assert mean.params == first.params == second.params
        assert first.value != second.value
        assert mean.value == pytest.approx(np.mean([first.value, second.value]), abs=1e-12)
        worst = {k: max(v, second.constraints[k]) for k, v in first.constraints.items()}
        assert mean.constraints == pytest.approx(worst, abs=1e-12)
        assert len(mean.intermediate_values) == 8


WIDE = (
    "gate.max_dppl=1e9", "gate.max_dppl_relative=1e9",
    "gate.max_dcc_rate=1", "gate.max_dmean_prob=1", "gate.max_js2d=1",
)  # fmt: skip


def test_two_objectives(own: World, tmp_path: Path) -> None:
    """keep_n and dnll: the fewest experts that hold the limits, and all of them on the front."""
    common = (
        *RANDOM[:2], "pruning.keep_multiple=1",
        "search.objectives=[keep_n,dnll]", "search.n_trials=8",
        "search.space={pruning.keep_n: {low: 2, high: 8}, pruning.seed: {low: 0, high: 3}}",
        "search.sampler={name: RandomSampler, arguments: {seed: 0}}",
    )  # fmt: skip
    done = search(own, tmp_path, *common, *WIDE)
    found = trials(tmp_path)
    fewest = min(int(t.params["pruning.keep_n"]) for t in found)
    assert facts(done)["best_values"]["keep_n"] == fewest == len(done.result["plan"]["kept"][0])
    assert facts(done)["best_values"]["dnll"] == min(
        t.values[1] for t in found if t.values[0] == fewest
    )
    assert {t.values[0] for t in found} == {t.params["pruning.keep_n"] for t in found}
    (page,) = done.cwd.rglob("search/plots.html")
    named = re.findall('<section id="([a-z_]+)">', page.read_text())
    assert {"pareto", "history_keep_n", "parallel_dnll"} <= set(named)
    # with limits that nothing holds: the least violation, not the fewest experts
    narrow = search(own, tmp_path / "narrow", *common, "gate.max_dppl=0", "gate.max_js2d=0")
    least = min(
        trials(tmp_path / "narrow"),
        key=lambda t: sum(max(c, 0) for c in t.constraints.values()),
    )
    assert facts(narrow)["study"] != facts(done)["study"]  # other limits, other constraints
    assert facts(narrow)["best_trial"] == least.number


def test_spaces_of_floats_integers_and_choices(own: World, tmp_path: Path) -> None:
    space = (
        "search.space={pruning.w_conflict: {low: -4, high: 0, step: 0.5}, "
        "pruning.quantile: {low: 0.05, high: 0.5, log: true}, "
        "pruning.core_pos_top_m: {low: 0, high: 2}, "
        "pruning.keep_n: {low: 4, high: 8}, "
        "pruning.saliency: {choices: [gate_norm, norm, gate]}, "
        "pruning.reduce: {choices: [sum, mean]}}"
    )
    done = search(
        own, tmp_path, "pruning=eaft_reap", space, "search.n_trials=10", "search.objectives=[js2d]"
    )
    assert set(facts(done)["best_values"]) == {"js2d"}
    for trial in trials(tmp_path):
        values = trial.params
        assert (values["pruning.w_conflict"] / 0.5).is_integer()
        assert 0.05 <= values["pruning.quantile"] <= 0.5
        assert values["pruning.core_pos_top_m"] in (0, 1, 2)
        assert values["pruning.keep_n"] in (4, 8)  # steps of keep_multiple
        assert values["pruning.saliency"] in ("gate_norm", "norm", "gate")
        assert values["pruning.reduce"] in ("sum", "mean")
        if "kept" in trial.user_attrs:  # not the same plan as an earlier one
            kept = json.loads(trial.user_attrs["kept"])
            assert {len(layer) for layer in kept} == {values["pruning.keep_n"]}
    assert len({str(t.params) for t in trials(tmp_path)}) == 10


def test_a_trial_that_cannot_be_does_not_end_the_search(own: World, tmp_path: Path) -> None:
    """More core experts than keep_n: those trials fail, say so, and others take their place."""
    space = "search.space={pruning.keep_n: {choices: [2, 8]}, pruning.seed: {low: 0, high: 99}}"
    done = search(
        own, tmp_path, "pruning=random", "pruning.core_pos_top_m=4", "pruning.keep_multiple=1",
        space, "search.sampler={name: RandomSampler, arguments: {seed: 1}}",
    )  # fmt: skip
    states = [t.state.name for t in trials(tmp_path)]
    assert states.count("COMPLETE") == facts(done)["trials"] == 6
    assert states.count("FAIL") == facts(done)["trials_failed"] > 0
    for trial in trials(tmp_path):
        if trial.state.name == "FAIL":
            assert "core experts" in trial.user_attrs["error"]
    outcomes = [child.data.tags["trial.outcome"] for child in points(own, done)]
    assert sum("core experts" in outcome for outcome in outcomes) == states.count("FAIL")
    never = search(
        own, tmp_path / "never", "pruning=random", "pruning.core_pos_top_m=2",
        "pruning.core_count_top_m=2", "pruning.keep_multiple=1", "pruning.keep_n=2", RANDOM[2],
    )  # fmt: skip
    assert "core experts" in never.failed()
    assert [t.state.name for t in trials(tmp_path / "never")] == ["FAIL"] * 5


def test_a_grid_ends_when_it_is_exhausted_whatever_its_trials_ran_into(
    own: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """numpy, which draws the random plan, gives up in two of four trials."""
    ends = {71: MemoryError("Unable to allocate 1.00 TiB"), 72: SystemExit(0)}
    draw = np.random.default_rng

    def default_rng(seed: Any = None) -> np.random.Generator:
        if isinstance(seed, int) and seed in ends:
            raise ends[seed]
        return draw(seed)

    monkeypatch.setattr(np.random, "default_rng", default_rng)
    done = search(
        own, tmp_path, *RANDOM[:2], "search.space={pruning.seed: {low: 70, high: 73}}",
        "search.n_trials=50",
        "search.sampler={name: BruteForceSampler, arguments: {}}",
    )  # fmt: skip
    assert (facts(done)["trials"], facts(done)["trials_failed"]) == (2, 2)
    found = {t.params["pruning.seed"]: t for t in trials(tmp_path)}
    assert sorted(found) == [70, 71, 72, 73]
    assert {seed: t.user_attrs.get("error") for seed, t in found.items()} == {
        70: None, 71: "MemoryError: Unable to allocate 1.00 TiB",
        72: "SystemExit: 0", 73: None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["search.sampler.name=TPE"], ["search.sampler.name", "TPESampler"]),
        (["search.sampler.arguments={sed: 1}"], ["search.sampler.arguments", "'sed'", "seed"]),
        (["search.sampler={name: GridSampler, arguments: {}}"], ["search.sampler", "search_space"]),
        (["search.pruner={name: Median, arguments: {}}"], ["search.pruner.name", "MedianPruner"]),
        (
            ["search.space={pruning.quantile: {low: 0, high: 0.5}}"],
            ["search.space.pruning.quantile", "0"],
        ),
        (
            ["search.space={pruning.reduce: {choices: [total]}}"],
            ["search.space.pruning.reduce", "total"],
        ),
        (
            ["search.space={pruning.keep_n: {low: 3, high: 8}}"],
            ["search.space.pruning.keep_n", "multiple"],
        ),
        (["search.space={pruning.keep_n: {low: 4, high: 16}}"], ["pruning.keep_n = 16", "2..8"]),
        (
            ["search.space={pruning.seed: {low: 0.5, high: 8}}"],
            ["search.space.pruning.seed", "whole"],
        ),
        (
            ["search.space={pruning.w_good: {low: 1, high: 2, log: true, step: 1}}"],
            ["search.space.pruning.w_good", "step", "log"],
        ),
        (["search.storage=nosuch://x"], ["search.storage", "nosuch"]),
        (
            ["search.storage=postgresql+psycopg://me:secret@127.0.0.1:1/x"],
            ["search.storage", "***"],
        ),
        (["search.num_blocks=100000"], ["blocks"]),
        (["eval.num_blocks=100000"], ["blocks"]),
    ],
)
def test_wrong_settings_are_clear_and_code_2(
    own: World, tmp_path: Path, overrides: list[str], words: list[str]
) -> None:
    if any("postgresql" in o for o in overrides):
        pytest.importorskip("psycopg")
    error = search(own, tmp_path, *overrides).failed(code=2)
    for word in words:
        assert word in error
    assert "secret" not in error


def test_what_pydantic_refuses_is_refused_before_anything_runs(own: World, tmp_path: Path) -> None:
    line = search(own, tmp_path, "search.space={pruning.keepn: {low: 1, high: 2}}").refused()
    assert "pruning.keepn" in line
    assert "pruning.keep_n" in line
    assert "choices" in search(own, tmp_path, "search.space={pruning.seed: {low: 1}}").refused()


def test_a_named_study_of_another_problem_is_refused(own: World, tmp_path: Path) -> None:
    named = (*RANDOM, "search.study=mine", "search.n_trials=1")
    assert facts(search(own, tmp_path, *named))["study"] == "mine"
    error = search(own, tmp_path, *named, "search.num_blocks=4").failed()
    assert "search.study = 'mine'" in error
    error = search(own, tmp_path, *named, "gate.max_js2d=0.5").failed()
    assert "search.study = 'mine'" in error
    # what the space draws itself, and how it is drawn, are not the problem
    again = search(own, tmp_path, *named, "pruning.seed=9", "search.sampler.arguments={seed: 8}")
    assert facts(again)["trials_now"] == 0


@pytest.mark.slow
def test_two_workers_share_one_study(
    own: World, whole: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They draw and find what one process does; this one waits in its first trial for the other."""
    database = tmp_path / "optuna.db"  # made when the search starts to ask
    deadline = time.monotonic() + 300
    draw = np.random.default_rng

    def workers() -> set[int]:
        found = trials(tmp_path)
        return {t.user_attrs["process"]["process.pid"] for t in found if t.user_attrs}

    def default_rng(seed: Any = None) -> np.random.Generator:
        if database.exists():
            while len(workers()) < 2 and time.monotonic() < deadline:
                time.sleep(0.2)
        return draw(seed)

    monkeypatch.setattr(np.random, "default_rng", default_rng)
    done = search(own, tmp_path, *RANDOM, "search.workers=2", "search.early_stop=false")
    assert (facts(done)["trials"], facts(done)["trials_failed"]) == (6, 0)
    assert len(workers()) == 2
    mine, alone = trials(tmp_path), trials(own.home)
    assert [t.params for t in mine] == [t.params for t in alone]
    assert [t.values for t in mine] == [t.values for t in alone]
    assert facts(done)["best_trial"] == facts(whole)["best_trial"]
    assert [c.info.run_name for c in points(own, done)] == [f"trial {t.number}" for t in mine]


def complete(found: Sequence[optuna.trial.FrozenTrial]) -> list[optuna.trial.FrozenTrial]:
    return [t for t in found if t.state.name == "COMPLETE"]


@pytest.mark.slow
def test_a_search_that_is_stopped_goes_on(own: World, whole: Done, tmp_path: Path) -> None:
    """Ctrl-C and kill -9 lose at most the running trial; the end is that of a search unharmed."""
    uri = f"sqlite:///{tmp_path}/mlruns/mlflow.db"
    world = own.elsewhere(tmp_path / "world", uri=uri)
    world.home.mkdir()
    settings = (*RANDOM, "search.early_stop=false")
    command = (*SMALL, *settings, f"search.storage=sqlite:///{tmp_path}/optuna.db")
    process = world.start(*command)
    process.reach("trial 1")
    process.send(signal.SIGINT)
    assert process.wait() == 130, process.text
    left = trials(tmp_path)
    assert len(complete(left)) >= 2
    assert all(t.state.is_finished() for t in left)
    (path,) = (world.home / "cwd0").rglob("result.json")
    value = json.loads(path.read_text())
    assert value["status"] == "KILLED"
    run = MlflowClient(tracking_uri=world.uri).get_run(value["mlflow_run_id"])
    assert run.info.status == "KILLED"
    process = world.start(*command)
    process.reach(f"trial {len(left)} ")
    assert process.kill()
    assert len(complete(trials(tmp_path))) > len(complete(left))
    assert len(trials(tmp_path)) < 8
    done = search(world, tmp_path, *settings)
    assert facts(done)["trials"] == 6
    finished = complete(trials(tmp_path))
    lost = [t for t in trials(tmp_path) if t.state.name != "COMPLETE"]
    assert len(lost) <= 2
    assert all(t.state.name == "FAIL" for t in lost)
    assert [t.params for t in finished] == [t.params for t in trials(own.home)]
    assert [t.value for t in finished] == pytest.approx(
        [t.value for t in trials(own.home)], abs=1e-6
    )


def test_above_zero_is_the_ratio_estimators_interval() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(20, 60, 12)
    for shift in (0.0, 0.01, 0.05, 0.2):
        change = rng.normal(shift, 0.2, 12) * tokens
        ratio = change.sum() / tokens.sum()
        residuals = [c - ratio * t for c, t in zip(change, tokens, strict=True)]
        variance = sum(r * r for r in residuals) / 11 * 12 / tokens.sum() ** 2
        lower = ratio - stats.t.ppf(0.95, 11) * math.sqrt(variance)
        assert above_zero(change, tokens, 0.95) == (lower > 0)
    assert not above_zero(np.ones(3), np.ones(3, np.int64), 0.95)
    assert above_zero(np.ones(4), np.ones(4, np.int64), 0.95)


@pytest.mark.parametrize("blocks", [4, 8, 32])
def test_above_zero_errs_as_often_as_it_says(blocks: int) -> None:
    """With no difference in truth, 95% confidence is wrong in about 5% of draws."""
    rng = np.random.default_rng(blocks)
    tokens = rng.integers(300, 700, (4000, blocks))
    change = rng.normal(0, 1, (4000, blocks)) * np.sqrt(tokens)
    wrong = np.mean([above_zero(c, t, 0.95) for c, t in zip(change, tokens, strict=True)])
    assert 0.03 < wrong < 0.07


def test_defaults_of_the_settings_are_one_objective_and_stopping() -> None:
    values = {
        "storage": "x", "n_trials": 1, "space": {"pruning.seed": {"low": 0, "high": 1}},
        "seq_len": 8, "num_blocks": 1, "chunk_blocks": 1,
    }  # fmt: skip
    settings = SearchSettings.model_validate(values)
    assert settings.objectives == ("dnll",)
    assert settings.early_stop
    assert settings.early_stop_confidence == 0.95
    assert settings.pruner is None
