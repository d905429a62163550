"""eval.early_stop: stops when sure, shares its chunks, and else sees what a whole run sees."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from support.gates import around, changed, report, v1
from support.runs import Done, World

from eaft_prune.records.evaluation import load_evaluation
from eaft_prune.stages.gate import gate

pytest_plugins = ("support.worlds",)

ASKED = (
    "eval.num_blocks={UNION: 240, default: 64}", "eval.seq_lens=[64]", "gate.seq_lens=[64]",
    "eval.seed=0", "eval.candidates=[masked]", "eval.packs=[UNION,alpha]",
)  # fmt: skip
WIDE = tuple(
    f"gate.max_{name}={limit}"
    for name, limit in {
        "dppl": 1e9, "dppl_relative": 1e9, "dcc_rate": 1, "dmean_prob": 1, "js2d": 5,
    }.items()
)  # fmt: skip


def chunks(done: Done) -> dict[str, bool]:
    """Name of every evaluation and whether it came from the store."""
    return {
        s["stage"]: s["cached"] for s in done.result["stages"] if s["stage"].startswith("evaluate/")
    }


@pytest.fixture(scope="module")
def stopped(world: World) -> Done:
    return world.run(*ASKED, *WIDE, "eval.early_stop=true")


def test_it_stops_at_the_first_analysis_that_is_sure(stopped: Done) -> None:
    gate_ = stopped.result["gate"]
    assert gate_["status"] == "PASS"
    assert gate_["confidence"] == pytest.approx(0.99)  # five analyses share the 5%
    reports = stopped.result["reports"]["masked"]
    assert 4 <= reports["UNION"]["64"]["blocks"] <= 120
    assert reports["alpha"]["64"]["blocks"] > 30  # not read by the gate: whole
    seen = {name for name in chunks(stopped) if "/UNION/" in name}
    assert {"evaluate/base/UNION/64/0-30", "evaluate/masked/UNION/64/0-30"} <= seen
    assert not any(name.endswith("-240") for name in seen)


def test_what_is_never_sure_sees_all_blocks_and_shares_the_first_chunks(
    world: World, stopped: Done
) -> None:
    never = ["gate.confidence=0.99999999", "eval.early_stop=true"]
    done = world.run(*ASKED, *WIDE, "gate.max_js2d=1e-9", *never)
    whole = world.run(*ASKED, *WIDE, "gate.max_js2d=1e-9")
    assert done.result["gate"]["status"] == "INCONCLUSIVE"
    again = chunks(done)
    assert all(again[name] for name in chunks(stopped))
    assert not again["evaluate/masked/UNION/64/120-240"]
    for pack in ("UNION", "alpha"):
        for model in ("base", "masked"):
            ours, theirs = (
                {name: x for name, x in run.result["reports"][model][pack]["64"].items() if x}
                for run in (done, whole)
            )
            assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)


def test_without_early_stop_nothing_is_cut(world: World) -> None:
    done = world.run(*ASKED, *WIDE)
    assert set(chunks(done)) == {
        f"evaluate/{model}/{pack}/64" for model in ("base", "masked") for pack in ("UNION", "alpha")
    }
    assert done.result["gate"]["confidence"] == 0.95


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("task=evaluate", "task=pipeline"),
        ("gate.confidence=null", "gate.confidence"),
        ("eval.seed=null", "eval.seed"),
    ],
)
def test_what_cannot_stop_is_refused(world: World, override: str, said: str) -> None:
    line = world.run(*ASKED, "eval.early_stop=true", override).refused()
    assert "eval.early_stop" in line
    assert said in line


def test_asking_five_times_is_not_five_times_as_wrong() -> None:
    """A change exactly on its limit, seen at growing shares of the same blocks."""
    rng = np.random.default_rng(0)
    settings = v1(seq_lens=(1024,))
    strict = settings.over(5).confidence
    assert strict == pytest.approx(0.99)
    key, wrong, runs = ("UNION", 1024), 0, 400
    for _ in range(runs):
        steps = rng.normal(0, np.sqrt(np.diff([0, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1])))
        for share, total in zip([1 / 16, 1 / 8, 1 / 4, 1 / 2, 1], np.cumsum(steps), strict=True):
            error = 0.1 * 0.02 / math.sqrt(share)
            drawn = around(0.02 + 0.1 * 0.02 * total / share, error, strict)
            both = [{key: report(p=p, blocks=100)} for p in (0.5, 0.5 + drawn.value)]
            verdict = gate(settings.over(5), *both, {key: changed(dmean_prob=drawn)})
            if verdict.status != "INCONCLUSIVE":
                wrong += verdict.status == "PASS"
                break
    assert wrong / runs < 0.05


def test_an_analysis_sees_a_random_part_of_the_blocks(
    world: World, stopped: Done, tmp_path: Path
) -> None:
    """Not the first blocks, where packs that end early are."""
    whole = world.run(*ASKED, *WIDE)
    parts, key = [], ("UNION", 64)
    for run in (stopped, whole):
        scores = load_evaluation(run.cwd / run.result["evaluations"]["base"]).scores[key]
        parts.append([scores.logp_T[scores.block_T == b] for b in np.unique(scores.block_T)])
    seen = [
        number
        for mine in parts[0]
        for number, block in enumerate(parts[1])
        if len(mine) == len(block) and np.allclose(mine, block, atol=1e-5)
    ]
    assert len(seen) >= len(parts[0]) >= 20
    assert len(parts[1]) > 150
    late = [number for number in seen if number >= len(parts[1]) // 2]
    assert len(seen) / 4 < len(late) < 3 * len(seen) / 4
