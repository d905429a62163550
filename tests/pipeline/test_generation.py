"""eval.generation in runs: prompts, batches that are kept, controls, and what is refused."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from support.runs import World

from eaft_prune.config import GenerationSettings
from eaft_prune.core.generation import Prompts, Written, joined
from eaft_prune.core.types import UserError
from eaft_prune.packs.tokenizer import load_tokenizer
from eaft_prune.stages.generate import compare, prompts, stops

pytest_plugins = ("support.worlds",)

ASKED = (
    *("eval.generation=true", "generation.prompts=4", "generation.max_new_tokens=10"),
    *("generation.batch=5", "generation.seeds=[3]", "eval.num_blocks=4", "eval.packs=null"),
)
TALK = (
    "<|start|>system<|message|>S<|end|><|start|>user<|message|>one<|end|>"
    "<|start|>assistant<|channel|>analysis<|message|>t<|end|>"
    "<|start|>assistant<|channel|>final<|message|>a<|end|>"
    "<|start|>user<|message|>two<|end|><|start|>assistant<|channel|>final<|message|>b<|return|>"
)


def asked(**more: int) -> GenerationSettings:
    return GenerationSettings(**{"prompts": 1, "max_prompt_tokens": 500, **more})


def test_a_prompt_ends_where_the_last_fitting_turn_begins(world: World) -> None:
    tokenizer = load_tokenizer(world.model)
    decode = tokenizer.inner.decode
    (whole,) = prompts(asked(), {"a": [TALK]}, tokenizer).lists
    assert decode(whole) == TALK[: TALK.rindex("assistant") + len("assistant")]
    (short,) = prompts(asked(max_prompt_tokens=len(whole) - 1), {"a": [TALK]}, tokenizer).lists
    first = TALK.index("<|start|>assistant") + len("<|start|>assistant")
    assert decode(short) == TALK[:first]  # not between a thought and its answer
    both = prompts(
        asked(), {"a": [TALK], "b": ["<|start|>user<|message|>q<|end|>" + TALK]}, tokenizer
    )
    assert both.packs == ("a", "b")
    assert sorted(both.pack_P.tolist()) == [0, 1]
    assert np.diff([0, *both.ends_P]).tolist() == sorted(map(len, both.lists))
    with pytest.raises(UserError, match=r"pack a: 1 conversations .* generation.prompts = 2"):
        prompts(asked(prompts=2), {"a": [TALK, TALK]}, tokenizer)  # equal ones are one


def test_answers_are_of_the_last_turn_and_right_ones_are_counted(world: World) -> None:
    tokenizer = load_tokenizer(world.model)
    told = {TALK: "42"}
    found = prompts(asked(), {"a": [TALK]}, tokenizer, told)
    assert found.answers == ("42",)
    shorter = asked(max_prompt_tokens=int(found.ends_P[-1]) - 1)
    assert prompts(shorter, {"a": [TALK]}, tokenizer, told).answers == (None,)

    def written(*finals: str) -> Written:
        turns = [f"<|channel|>final<|message|>{final}<|return|>" for final in finals]
        ids = tokenizer.encode(turns)
        return Written(*joined(ids), np.array([True] * len(ids)))

    four = Prompts(np.arange(4, dtype=np.int32), np.arange(1, 5), np.zeros(4, np.int32), ("a",),
                   ("42", "B", None, "7"))  # fmt: skip
    base, other = written("42", "B", "x", "7"), written("42", "A", "y", "8")
    report = compare(four, {"greedy": base}, {"greedy": other}, tokenizer, 0.95)
    assert report.answered is not None
    assert report.answered.rows == 3  # the third has no answer
    assert report.answered["dtask_accuracy"].value == pytest.approx(-2 / 3)
    assert (report.base["task_accuracy"], report.candidate["task_accuracy"]) == (1, 1 / 3)
    assert report.base["well_formed_rate"] == report.candidate["ended_rate"] == 1


def test_stops_are_the_ends_of_a_turn(world: World) -> None:
    tokenizer = load_tokenizer(world.model)
    texts = [tokenizer.inner.decode(list(stop)) for stop in stops(tokenizer)]
    assert texts[1:3] == ["<|return|>", "<|call|>"]
    assert "<|start|>user" in texts
    assert not any("assistant" in text for text in texts)


def test_a_model_beside_itself_writes_the_same(world: World) -> None:
    done = world.run("task=noise_floor", *ASKED)
    assert done.code == 0, done.out + done.err
    found = done.result["generated"]["repeat"]
    changes = found["changes"]
    assert changes["rows"] == 12
    assert found["base"] == found["candidate"]
    for name in ("dloop_rate", "dended_rate", "dwell_formed_rate"):
        assert (changes[name]["low"], changes[name]["high"]) == (0, 0)
    assert changes["agreement"]["value"] == changes["length_ratio"]["value"] == 1
    assert found["median_first_difference"] is None
    beside = done.result["beside"]["repeat"]
    assert beside["not_measured"] == ["dtask_accuracy@generated", "dtask_recovery@tasks"]
    assert (beside["status"], beside["failed_checks"]) == ("INCONCLUSIVE", [])


def test_a_killed_run_goes_on_with_its_batch(world: World, tmp_path: Path) -> None:
    place = world.copied(tmp_path)
    command = ("pruning=random", "pruning.core_pos_top_m=0", "pruning.keep_n=4", *ASKED)
    first = place.run(*command)
    assert first.code == 0, first.out + first.err
    written = {s["stage"]: s for s in first.result["stages"] if s["stage"].startswith("generate/")}
    # 12 prompts in batches of 5, greedy and one seed, two models
    assert len(written) == 3 * 2 * 2
    lost = "generate/pruned/seed 3/5-10"
    shutil.rmtree(place.store / "generate" / written[lost]["key"])
    again = place.run(*command).result
    assert [s["stage"] for s in again["stages"] if not s["cached"]] == [lost]
    assert again["generated"] == first.result["generated"]
    found = again["generated"]["pruned"]
    assert found["changes"]["agreement"]["value"] < 1
    assert (
        sum(
            found["flips"]["ended_rate"][n]
            for n in ("both", "base_only", "candidate_only", "neither")
        )
        == 12
    )
    page = next(first.cwd.rglob("report.html")).read_text()
    assert "McNemar p" in page
    assert "12 prompts" in page


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["task=evaluate"], "task=pipeline"),
        (["engine.name=support.engines:SILENT"], "not engine.name=silent: drop it"),
        (["packs.format=plain"], "packs.format=harmony"),
        (["generation.prompts=5000"], "lower that"),
        (["generation.max_new_tokens=100000"], "the model has place for"),
        (["eval.generation=false", "eval.tasks=[quiz]", "task=evaluate"], "task=pipeline"),
        pytest.param(
            ["eval.generation=false", "eval.tasks=[quiz]"],
            "pip install 'eaft_prune[tasks]'",
            marks=pytest.mark.skipif(
                find_spec("lm_eval") is not None, reason="lm-evaluation-harness is installed"
            ),
        ),
    ],
)
def test_what_cannot_be_is_said(world: World, settings: list[str], said: str) -> None:
    done = world.run(*ASKED, *settings)
    assert done.code == 2
    assert said in done.out + done.err


def test_too_few_conversations_are_told_before_any_work(world: World, tmp_path: Path) -> None:
    place = world.copied(tmp_path)
    assert place.run(*ASKED, "generation.prompts=5000").code == 2
    assert {home.name for home in place.store.iterdir()} <= {"inspect", "pack", "prompts"}
