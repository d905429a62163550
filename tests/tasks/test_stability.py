"""Stability, ablation and converged profiles: pure parts against oracles, tasks end to end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from mlflow import MlflowClient
from support.runs import World
from support.traces import pruning, trace

from eaft_prune.config import AblateSettings, StabilitySettings
from eaft_prune.core.types import Blocks, KeepPlan, TokenScores, UserError
from eaft_prune.pipeline.traces import doubling, joined
from eaft_prune.stages.score import score
from eaft_prune.tasks.ablate import paired_interval, variants_of
from eaft_prune.tasks.stability import first_rows, kept_shares, resamples, undecided

if TYPE_CHECKING:
    from eaft_prune.engines.transformers import TransformersEngine

pytest_plugins = ("support.worlds",)

HOW = StabilitySettings(seeds=(1,), row_shares=(0.5,), resamples=40, confidence=0.9, seed=0)
INTERVALS = AblateSettings(confidence=0.9)


def test_resamples_are_reproducible_and_keep_every_packs_number_of_rows() -> None:
    t = trace(20, 200, rows=12)
    s = pruning(keep_n=4, core_pos_top_m=0, keep_multiple=1)
    found = resamples(HOW, s, t)
    assert [kept.digest for _, kept in found] == [k.digest for _, k in resamples(HOW, s, t)]
    assert len(found) == 40
    assert len({kept.digest for _, kept in found}) > 1
    scores = np.stack([scores.score_LE for scores, _ in found])
    whole = score(s, t).score_LE
    error = scores.std(axis=0) / np.sqrt(len(found))
    assert (abs(scores.mean(axis=0) - whole) <= 4 * error + 1e-9).all()  # drawn around the whole


def test_the_tie_zone_is_what_resamples_disagree_on() -> None:
    plans = [KeepPlan(((0, 1),), 4)] * 6 + [KeepPlan(((0, 2),), 4)] * 4
    shares = kept_shares(plans)
    np.testing.assert_allclose(shares, [[1, 0.6, 0.4, 0]])
    assert undecided(shares, 0.95) == [[1, 2]]
    assert undecided(shares, 0.55) == [[]]  # 0.6 is above, 0.4 below


def test_an_expert_far_above_the_cut_is_in_no_tie_zone() -> None:
    """Two experts of equal strength at the cut are in it; clear ones are not."""
    t = trace(21, 600, rows=60)
    norms = np.array([9.0, 9.0, 5.0, 5.0, 0.1, 0.1, 0.1], np.float32)[t.experts_TLK]
    noise = np.random.default_rng(0).normal(1, 0.05, norms.shape).astype(np.float32)
    t = type(t)(**{**vars(t), "norms_TLK": norms * noise})
    s = pruning(
        saliency="norm", weight="uniform", reduce="mean", keep_n=3, core_pos_top_m=0,
        keep_multiple=1,
    )  # fmt: skip
    found = undecided(kept_shares([kept for _, kept in resamples(HOW, s, t)]), 0.9)
    for zone in found:
        assert set(zone) <= {2, 3}
    assert any(zone == [2, 3] for zone in found)


def test_the_first_rows_are_whole_rows() -> None:
    t = trace(22, 100, rows=10)
    rows = np.unique(t.row_T)
    half = first_rows(t, 0.5)
    assert np.unique(half.row_T).tolist() == rows[: -(-len(rows) // 2)].tolist()
    assert len(half) == sum(r in np.unique(half.row_T) for r in t.row_T)
    assert len(np.unique(first_rows(t, 1e-6).row_T)) == 1


def tokens(logp: Any, blocks: Any) -> TokenScores:
    logp = np.array(logp, np.float32)
    return TokenScores(logp, np.zeros_like(logp), np.array(blocks, np.int32))


def test_the_interval_is_paired_over_blocks() -> None:
    """A constant loss has no width however much the tokens vary; other losses that of blocks."""
    rng = np.random.default_rng(0)
    row_T = np.repeat(np.arange(400), 5).astype(np.int32)
    base = -rng.exponential(2.0, 2000)
    value, low, high = paired_interval(
        INTERVALS, tokens(base, row_T), tokens(base - 0.1, row_T), row_T
    )
    assert (value, low, high) == pytest.approx((0.1, 0.1, 0.1), abs=1e-5)
    by_row = rng.normal(0.1, 0.2, 400)
    worse = tokens(base - by_row[row_T], row_T)
    value, low, high = paired_interval(INTERVALS, tokens(base, row_T), worse, row_T)
    assert value == pytest.approx(by_row.mean(), abs=1e-5)
    half_width = 1.645 * by_row.std(ddof=1) / np.sqrt(400)
    assert half_width < high - value < 1.5 * half_width  # and one row that nobody has seen
    assert half_width < value - low < 1.5 * half_width
    back = paired_interval(INTERVALS, worse, tokens(base, row_T), row_T)
    assert back == pytest.approx((-value, -high, -low), abs=1e-9)
    one = np.zeros(2000, np.int32)
    assert paired_interval(INTERVALS, tokens(base, row_T), worse, one)[1:] == (-np.inf, np.inf)


def test_terms_add_up_to_the_full_score() -> None:
    t, s = trace(23), pruning()
    variants = variants_of(s)
    scores = {name: score(how, t).score_LE for name, how in variants.items()}
    parts = sum(scores[f"{region}_only"] for region in ("good", "uncertain", "conflict"))
    np.testing.assert_allclose(parts, scores["full"], rtol=1e-10)
    assert np.array_equal(scores["full"], score(s, t).score_LE)
    assert np.array_equal(scores["reap"], score(pruning(weight="uniform"), t).score_LE)


def test_a_term_without_weight_cannot_be_ablated() -> None:
    with pytest.raises(UserError, match=r"w_uncertain = 0"):
        variants_of(pruning(w_uncertain=0.0))
    with pytest.raises(UserError, match="random"):
        variants_of(pruning(saliency="random"))


@pytest.mark.parametrize(
    ("first", "total", "expected"),
    [(8, 64, [8, 16, 32, 64]), (8, 20, [8, 16, 20]), (8, 8, [8]), (8, 3, [3]), (1, 3, [1, 2, 3])],
)
def test_interim_plans_double_until_all_blocks(first: int, total: int, expected: list[int]) -> None:
    assert doubling(first, total) == expected


def test_traces_of_parts_are_the_trace_of_all(
    engine: TransformersEngine, make_blocks: Callable[..., Blocks]
) -> None:
    blocks = make_blocks(5, 32)
    whole = engine.trace(blocks, lambda done: None)
    cuts = [(0, 2), (2, 3), (3, 5)]

    def part(first: int, end: int) -> Blocks:
        cut = {n: getattr(blocks, n)[first:end] for n in ("ids_BS", "scored_BS", "row_BS")}
        return Blocks(**{**vars(blocks), **cut})

    parts = [engine.trace(part(*cut), lambda done: None) for cut in cuts]
    again = joined(parts, [a for a, _ in cuts])
    for name in ("experts_TLK", "pack_T", "row_T"):
        assert np.array_equal(getattr(again, name), getattr(whole, name)), name
    assert np.array_equal(again.scores.block_T, whole.scores.block_T)
    np.testing.assert_allclose(again.weights_TLK, whole.weights_TLK, rtol=1e-4)
    np.testing.assert_allclose(again.norms_TLK, whole.norms_TLK, rtol=1e-4)
    np.testing.assert_allclose(again.scores.logp_T, whole.scores.logp_T, atol=1e-4)


def profiled(result: dict[str, Any]) -> dict[str, bool]:
    """Profile stages and whether they came from the store."""
    return {s["stage"]: s["cached"] for s in result["stages"] if s["stage"].startswith("profile")}


def test_a_profile_stops_when_the_plan_stays(world: World) -> None:
    """With a bar of any plan it stops at the second plan; with one out of reach it takes all."""
    settings = ("task=profile", "profile.early_stop=true", "profile.early_stop_first_blocks=2")
    early = world.run(*settings, "profile.early_stop_agreement=0.01").result
    assert profiled(early) == {
        "profile/0-2": False, "profile/2-4": False, "profile/converged": False,
    }  # fmt: skip
    (joint,) = (s for s in early["stages"] if s["stage"] == "profile/converged")
    assert joint["facts"]["tokens"] == 4 * 64
    assert joint["facts"]["tokens_at_most"] == 8 * 64
    assert len(joint["facts"]["agreement"]) == 1
    # another criterion that stops elsewhere shares what was traced
    other = world.run(*settings, "profile.early_stop_agreement=1", "pruning=random").result
    assert profiled(other) == {  # random scores never move: it stops at the second plan too
        "profile/0-2": True, "profile/2-4": True, "profile/converged": True,
    }  # fmt: skip
    assert other["digests"]["profile/converged"] == early["digests"]["profile/converged"]
    whole = world.run("task=profile", "profile.num_blocks=2", "profile.early_stop=true").result
    plain = world.run("task=profile", "profile.num_blocks=2").result
    assert whole["plan"] == plain["plan"]  # one look at all blocks is a plain profile


def test_task_ablate_evaluates_the_base_once_and_each_plan_once(world: World) -> None:
    done = world.run("task=ablate", "pruning.core_pos_top_m=0", "pruning.quantile=0.5")
    assert done.code == 0, done.out + done.err
    result = done.result
    terms = result["facts"]["UNION/64"]
    assert set(terms) == {"full", "reap", "good_only", "uncertain_only", "conflict_only"}
    fresh = [s for s in result["stages"] if s["stage"].startswith("evaluate/") and not s["cached"]]
    base_fresh = any(s["stage"].startswith("evaluate/base") for s in fresh)
    assert len(fresh) - base_fresh <= result["facts"]["distinct_plans"]
    base = result["reports"]["base"]["UNION"]["64"]
    for name, row in terms.items():
        assert row["dnll_low"] <= row["dnll"] <= row["dnll_high"]
        change = result["reports"][name]["UNION"]["64"]["ppl"] - base["ppl"]
        assert row["dppl"] == pytest.approx(change, rel=1e-6)
    assert terms["full"]["overlap_full"] == 1
    assert terms["full"]["against_full"] == 0
    assert set(result["gates"]) == set(terms)
    assert "conflict_only" in done.out


def test_a_term_without_tokens_is_named_and_left_out(world: World) -> None:
    """No token lies below the least p and H: a plan of that term would rank nothing."""
    result = world.run("task=ablate", "pruning.core_pos_top_m=0", "pruning.quantile=0.001").result
    assert result["facts"]["conflict_tokens"] == 0
    assert result["facts"]["without_tokens"] == "conflict_only"
    assert set(result["facts"]["UNION/64"]) == {"full", "reap", "good_only", "uncertain_only"}
    assert "conflict_only" not in result["reports"]


def test_task_stability_agrees_with_itself(world: World) -> None:
    """The seed of the profile itself is the same profile; others are others."""
    done = world.run(
        "task=stability", "profile.seed=5", "stability.seeds=[5]", "stability.resamples=20"
    )
    assert done.code == 0, done.out + done.err
    facts = done.result["facts"]
    assert facts["agreement"]["seeds"]["jaccard"] == 1
    assert facts["agreement"]["seeds"]["spearman"] == pytest.approx(1)
    assert 0 < facts["agreement"]["bootstrap"]["jaccard"] <= 1
    assert set(facts["agreement"]) == {
        "seeds", "rows x 0.125", "rows x 0.25", "rows x 0.5", "bootstrap",
    }  # fmt: skip
    assert set(facts["tie_zone"]) == {"layer 0", "layer 1"}
    assert done.result["plan"]["kept"] == [list(ids) for ids in done.result["plan"]["kept"]]


def ragged(*more: str) -> tuple[str, ...]:
    return (
        "pruning.selection=effective_number", "pruning.keep_multiple=1", "pruning.min_keep_n=2",
        "pruning.core_pos_top_m=1", *more,
    )  # fmt: skip


def test_a_ragged_plan_goes_through_masked_and_padded(world: World) -> None:
    """From scores to report, and both ways of evaluating it read the same."""
    done = world.run(*ragged("eval.candidates=[masked,pruned]", "export.pad_ragged=true"))
    assert done.code == 0, done.out + done.err
    result = done.result
    sizes = [len(ids) for ids in result["plan"]["kept"]]
    assert sum(sizes) == 2 * 4
    assert len(set(sizes)) == 2
    masked, pruned = (result["reports"][m]["UNION"]["64"] for m in ("masked", "pruned"))
    assert pruned["ppl"] == pytest.approx(masked["ppl"], rel=1e-5)
    (text,) = done.cwd.rglob("report.md")
    assert "4.0 on average of 8 experts" in text.read_text()
    verified = world.run("task=verify", f"verify.path={result['checkpoint']['path']}")
    assert verified.code == 0, verified.out + verified.err
    assert f"keep{min(sizes)}to{max(sizes)}" in Path(result["checkpoint"]["path"]).name
    run = MlflowClient(tracking_uri=world.uri).get_run(result["mlflow_run_id"])
    assert run.data.metrics["summary/keep_n"] == np.mean(sizes) == 4


def test_a_ragged_plan_is_refused_before_anything_runs(world: World) -> None:
    line = world.run(*ragged()).refused()
    for word in ("pruning.selection", "effective_number", "masked", "export.pad_ragged"):
        assert word in line
