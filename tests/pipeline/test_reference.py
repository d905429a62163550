"""Every number of result.json against tests/reference.py, which shares no code with the package."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from support import reference, runs, tiny
from support.runs import Done, World

pytest_plugins = ("support.worlds",)

N_EXPERTS, KEEP_N, CORE = 16, 8, 4
SEQ_LENS, NUM_BLOCKS = (48, 96), 12
PACKS = ("alpha", "beta", "gamma", "UNION")
SETTINGS = (
    "packs.split=none",
    "profile.seed=null",
    "profile.num_blocks=10",
    "profile.seq_len=96",
    "eval=bigblocks",
    "eval.seed=null",
    f"eval.seq_lens={list(SEQ_LENS)}",
    f"eval.num_blocks={NUM_BLOCKS}",
    "eval.candidates=[pruned,masked]",
    f"gate.seq_lens={list(SEQ_LENS)}",
    f"pruning.keep_n={KEEP_N}",
    "runtime.progress=false",
    "runtime.dtype=float32",
    "runtime.threads=1",
)


@dataclass(frozen=True)
class Setup:
    world: World
    model: Any
    rows: dict[str, reference.Blocks]
    trace: reference.Routed


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory, world: World) -> Setup:
    home = tmp_path_factory.mktemp("reference")
    path = tiny.write_checkpoint(
        home / "model", seed=3, num_local_experts=N_EXPERTS, num_experts_per_tok=4
    )
    texts = {name: runs.rows(60, seed + 10) for seed, name in enumerate(world.packs)}
    packs = {name: runs.write_pack(home / f"{name}.parquet", texts[name]) for name in texts}
    runs.fit_head(path, [text for part in texts.values() for text in part[:20]])
    model = reference.load(path)
    rows = reference.tokenise(path, packs)
    trace = reference.profile(model, reference.cut(rows, "UNION", 96, 10))
    settings = replace(world, home=home, model=path, packs=packs, settings=SETTINGS)
    return Setup(settings, model, rows, trace)


@pytest.fixture(scope="module")
def done(setup: Setup) -> Done:
    done = setup.world.run()
    assert done.code == 0, done.out + done.err
    return done


Metrics = dict[str, float]


@dataclass(frozen=True)
class Expected:
    """By (model, pack, length): metrics, and how far float noise can move those that count."""

    metrics: dict[tuple[str, str, int], Metrics]
    slack: dict[tuple[str, str, int], Metrics]


@pytest.fixture(scope="module")
def expected(setup: Setup) -> Expected:
    plan = reference.keep(setup.trace, "eaft_reap", N_EXPERTS, KEEP_N, CORE)
    models = {"base": setup.model, "pruned": reference.prune(setup.model, plan)}
    out = Expected({}, {})
    for pack in PACKS:
        for seq_len in SEQ_LENS:
            blocks = reference.cut(setup.rows, pack, seq_len, NUM_BLOCKS)
            tokens = {name: reference.evaluate(model, blocks) for name, model in models.items()}
            for name in models:
                key = (name, pack, seq_len)
                out.metrics[key] = reference.metrics(tokens[name], tokens["base"])
                out.slack[key] = reference.slack(tokens[name], tokens["base"])
    return out


def test_the_setup_can_tell_a_wrong_number(setup: Setup, expected: Expected) -> None:
    base, pruned = (expected.metrics[model, "UNION", 96] for model in ("base", "pruned"))
    assert base["ppl"] < 20  # the fitted head predicts something, so that p spreads
    assert abs(pruned["ppl"] / base["ppl"] - 1) > 0.01
    assert pruned["js2d"] > 0.02
    plans = {
        str(reference.keep(setup.trace, name, N_EXPERTS, KEEP_N, 0)) for name in reference.CRITERIA
    }
    assert len(plans) >= 5  # criteria that all chose the same experts would test one criterion
    values = [value for slack in expected.slack.values() for value in slack.values()]
    assert sum(value > 0 for value in values) <= len(values) / 3  # most are compared exactly


def test_metrics_of_every_model_pack_and_length(done: Done, expected: Expected) -> None:
    reports = done.result["reports"]
    assert set(reports) == {"base", "pruned", "masked"}
    for model in reports:
        assert set(reports[model]) == set(PACKS)
        for pack in PACKS:
            assert set(reports[model][pack]) == {str(s) for s in SEQ_LENS}
            for seq_len in SEQ_LENS:
                ours = reports[model][pack][str(seq_len)]
                where = ("base" if model == "base" else "pruned", pack, seq_len)
                theirs, slack = expected.metrics[where], expected.slack[where]
                assert ours["scored_tokens"] == theirs["scored_tokens"], where
                assert ours["blocks"] == NUM_BLOCKS
                assert ours["ppl"] == pytest.approx(theirs["ppl"], rel=1e-4), where
                for name in theirs.keys() - {"scored_tokens", "ppl"}:
                    tolerance = 1e-5 + slack.get(name, 0.0)
                    assert abs(ours[name] - theirs[name]) <= tolerance, (*where, name)


@pytest.mark.parametrize(
    ("limits", "verdict"),
    [
        (reference.LIMITS, "FAIL"),
        (reference.Limits(1e6, 0.5, 0.002, 0.5, 0.02), "FAIL"),
        (reference.Limits(1e6, 0.5, 0.5, 0.5, 0.7), "PASS"),
    ],
)
def test_gate_of_every_candidate(
    setup: Setup, done: Done, expected: Expected, limits: reference.Limits, verdict: str
) -> None:
    if limits != reference.LIMITS:
        wider = (f"gate.max_{name}={value}" for name, value in limits._asdict().items())
        done = setup.world.run(*wider)
    result = done.result
    assert list(result["gates"]) == ["pruned", "masked"]
    for gate in result["gates"].values():
        checks = {(c["name"], c["seq_len"]): c for c in gate["checks"]}
        assert len(checks) == len(gate["checks"]) == 5 * len(SEQ_LENS)
        for seq_len in SEQ_LENS:
            base, pruned = (("base", "UNION", seq_len), ("pruned", "UNION", seq_len))
            theirs = reference.gate(expected.metrics[base], expected.metrics[pruned], limits)
            noise = {
                "dppl": 2e-4 * expected.metrics[base]["ppl"],
                "dppl_relative": 4e-4,
                "dcc_rate": expected.slack[base]["cc_rate"] + expected.slack[pruned]["cc_rate"],
                "js2d": expected.slack[pruned]["js2d"],
            }
            for name, (value, limit, passed) in theirs.items():
                ours = checks[name, seq_len]
                tolerance = 1e-5 + noise.get(name, 0.0)
                assert ours["pack"] == "UNION"
                assert abs(ours["value"] - value) <= tolerance
                assert ours["limit"] == pytest.approx(limit, rel=1e-4)
                if abs(abs(value) - limit) > tolerance:
                    assert ours["passed"] == passed
        assert gate["plain_status"] == verdict
        failed = [f"{c['name']}@UNION/{c['seq_len']}" for c in gate["checks"] if not c["passed"]]
        assert gate["plain_failed_checks"] == failed
        assert bool(failed) == (verdict == "FAIL")
    assert result["gate"] == result["gates"]["pruned"]


def test_the_pipelines_plan(setup: Setup, done: Done) -> None:
    plan = reference.keep(setup.trace, "eaft_reap", N_EXPERTS, KEEP_N, CORE)
    assert done.result["plan"]["kept"] == plan


@pytest.mark.parametrize("criterion", sorted(reference.CRITERIA))
def test_kept_experts(setup: Setup, done: Done, criterion: str) -> None:
    """Each criterion by score alone, some with a core by positive mass and by count."""
    points = [(0, 0), (2, 3)] if criterion in ("eaft_reap", "reap") else [(0, 0)]
    for core_pos, core_count in points:
        result = setup.world.run(
            "task=profile",
            f"pruning={criterion}",
            f"pruning.core_pos_top_m={core_pos}",
            f"pruning.core_count_top_m={core_count}",
        ).result
        theirs = reference.keep(setup.trace, criterion, N_EXPERTS, KEEP_N, core_pos, core_count)
        assert result["plan"]["kept"] == theirs
        assert result["plan"]["criterion"] == criterion


def test_the_written_checkpoint_is_the_sliced_model(setup: Setup, done: Done) -> None:
    """transformers loads the export and gives, bit by bit, the tensors of the sliced base."""
    ours = reference.load(Path(done.result["checkpoint"]["path"]))
    theirs = reference.prune(setup.model, done.result["plan"]["kept"])
    assert ours.config.num_local_experts == KEEP_N
    mine, other = ours.state_dict(), theirs.state_dict()
    assert set(mine) == set(other)
    for name in other:
        assert mine[name].equal(other[name]), name
