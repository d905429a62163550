"""From a pack's file to blocks through the command line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support import runs, tiny
from support.runs import Done, World, write_pack

pytest_plugins = ("support.worlds",)

TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}{% if m.channel %}<|channel|>{{ m.channel }}"
    "{% endif %}<|message|>{{ m.content }}<|end|>{% endfor %}"
)


def chat(count: int) -> list[list[dict[str, Any]]]:
    return [
        [
            {"role": "user", "content": f"seven plus {i}"},
            {"role": "assistant", "channel": "analysis", "content": "the sum of"},
            {"role": "assistant", "channel": "final", "content": f"equals nine {i}"},
        ]
        for i in range(count)
    ]


def rendered(messages: list[dict[str, Any]]) -> str:
    """What TEMPLATE makes of them, written without it."""
    text = ""
    for message in messages:
        text += "<|start|>" + message["role"]
        if "channel" in message:
            text += "<|channel|>" + message["channel"]
        text += "<|message|>" + message["content"] + "<|end|>"
    return text


def packing(done: Done) -> dict[str, Any]:
    """Facts of every pack stage by its name."""
    assert done.code == 0, done.out + done.err
    return {s["stage"]: s["facts"] for s in done.result["stages"] if s["stage"].startswith("pack/")}


def test_messages_and_their_text_are_the_same_blocks_and_the_same_evaluation(
    world: World, tmp_path: Path
) -> None:
    place = world.copied(tmp_path)
    (place.model / "chat_template.jinja").write_text(TEMPLATE)
    rows = chat(80)
    text = write_pack(tmp_path / "text.parquet", [rendered(row) for row in rows], "conversation")
    talk = tmp_path / "talk.parquet"
    pq.write_table(pa.table({"conversation": rows}), talk)
    ask = ("task=evaluate", "packs.text_column=conversation", "packs.split=none")
    first = replace(place, packs={"alpha": text}).run(*ask)
    second = replace(place, packs={"alpha": talk}).run(*ask)
    for facts in (packing(first), packing(second)):
        assert all(fact["scored_tokens"] > 0 for fact in facts.values())
    assert packing(first) == packing(second)
    cached = {s["stage"]: s["cached"] for s in second.result["stages"]}
    assert [cached[s] for s in cached if s.startswith("evaluate/")] == [True]
    assert [cached[s] for s in cached if s.startswith("pack/")] == [False]
    # another template is another text, whatever the store holds
    (place.model / "chat_template.jinja").write_text(TEMPLATE.replace("<|end|>", "!<|end|>"))
    third = replace(place, packs={"alpha": talk}).run(*ask)
    digests = [fact["token_digest"] for d in (second, third) for fact in packing(d).values()]
    assert digests[0] != digests[1]


def test_any_model_reads_a_pack_of_harmony_by_its_own_chat_template(
    world: World, tmp_path: Path
) -> None:
    """A model of another family, whose tokenizer knows no harmony."""
    path = tiny.write_moe(tmp_path / "qwen", "qwen3_moe", fused=False)
    (path / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
        "{% endfor %}"
    )
    place = replace(world.elsewhere(tmp_path), model=path)
    ask = ("task=evaluate", "packs.split=none")
    refused = place.run(*ask)
    assert refused.code == 2
    assert "packs.format=messages" in refused.err
    for facts in packing(place.run(*ask, "packs.format=messages")).values():
        assert 0 < facts["scored_tokens"] < facts["tokens"]
        assert facts["malformed_rows"] == 0
    refused = place.run("task=pipeline", "packs.format=messages", "eval.generation=true")
    assert refused.code == 2
    assert "eval.generation" in refused.err


def test_the_file_that_is_named_is_the_one_that_is_read(world: World, tmp_path: Path) -> None:
    """Beside it lies one that its name would match as a pattern."""
    named = write_pack(tmp_path / "tools[2].parquet", runs.rows(60, 5))
    write_pack(tmp_path / "tools2.parquet", runs.rows(60, 6))
    plain = write_pack(tmp_path / "plain.parquet", runs.rows(60, 5))
    ask, place = ("task=evaluate", "packs.split=none"), world.elsewhere(tmp_path)
    files = f"packs.files={{tools: '{named}'}}"
    there = packing(place.run(*ask, files))
    assert there == packing(replace(place, packs={"tools": plain}).run(*ask))


@pytest.mark.dear
@pytest.mark.process
def test_packs_are_read_where_nothing_can_be_written_to_a_home(
    world: World, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("a home that no directory can be made in")
    place = world.elsewhere(tmp_path)
    arguments = [*place.arguments, "task=evaluate"]
    nowhere = str(tmp_path / "file" / "home")
    done = runs.process(arguments, runs.fresh_directory(tmp_path), HOME=nowhere, HF_HOME=nowhere)
    assert done.code == 0, done.err


OPEN = "<|start|>user<|message|>nine<|start|>assistant<|message|>the sum of seven<|return|>"


def with_open(home: Path, count: int) -> Path:
    """60 rows, of which `count` have a message that is not closed."""
    return write_pack(home / "open.parquet", [*[OPEN] * count, *runs.rows(60 - count, 0)])


def test_malformed_rows_are_said_with_number_and_share(world: World, tmp_path: Path) -> None:
    place = world.elsewhere(tmp_path, packs={"alpha": with_open(tmp_path, 3)})
    all_rows = ("packs.split=none", "eval.num_blocks=all")
    share = ("profile.num_blocks=all", "packs.max_malformed=0.05")
    done = place.run("eval.candidates=[masked]", *all_rows, *share)
    (facts,) = [f for name, f in packing(done).items() if name.startswith("pack/eval/")]
    assert (facts["malformed_rows"], facts["rows"]) == (3, 60)
    said = "3 of 60 rows (5.0%) are not well-formed harmony"
    first = "the first in alpha: a message that is not closed before the next <|start|>"
    assert f"{said}, {first}" in done.out + done.err
    (page,) = done.cwd.rglob("outputs/*/*/report.html")
    assert said in page.read_text()
    # a stricter share refuses what is in the store by now
    strict = place.run("task=evaluate", *all_rows, "packs.max_malformed=0.049").failed()
    for word in (said, first, "packs.max_malformed", "0.049"):
        assert word in strict, (word, strict)
    assert "packs.max_malformed" in place.run("task=evaluate", *all_rows).failed()


def test_well_formed_rows_are_not_spoken_of(world: World) -> None:
    done = world.run("task=evaluate")
    assert {fact["malformed_rows"] for fact in packing(done).values()} == {0}
    assert "well-formed" not in done.err + done.out


def test_all_blocks_are_those_of_their_number_and_cost_no_second_evaluation(
    world: World, tmp_path: Path
) -> None:
    place = world.elsewhere(tmp_path)
    names = ("profile", "eval")
    every = place.run("eval.candidates=[masked]", *(f"{n}.num_blocks=all" for n in names))
    there = {name.split("/")[1]: facts["blocks"] for name, facts in packing(every).items()}
    assert set(there) == set(names)
    refused = place.run(f"eval.num_blocks={there['eval'] + 1}").failed()
    assert f"enough for {there['eval']} blocks: give eval.num_blocks=all" in refused
    numbers = (f"{name}.num_blocks={there[name]}" for name in names)
    again = place.run("eval.candidates=[masked]", *numbers)
    made = [s["stage"] for s in again.result["stages"] if not s["cached"]]
    assert [stage for stage in made if not stage.startswith("pack/")] == []
    assert len(made) == 2  # a number and `all` are different questions with one answer
    assert again.result["digests"] == every.result["digests"]


@pytest.mark.parametrize(
    "asked",
    [
        ("task=profile", "profile.early_stop=true", "profile.num_blocks=all"),
        ("task=profile", "pruning=leave_one_out", "marginal.num_blocks=all", "marginal.seq_len=64"),
        ("task=search", "search.n_trials=1", "search.num_blocks=all", "search.seq_len=64",
         "eval.num_blocks=4"),
        ("pruning.compensation=bias", "compensation.num_blocks=all"),
        ("task=pipeline", "eval.candidates=[masked]", "eval.early_stop=true", "eval.seed=0",
         "eval.num_blocks={default: all}"),
    ],
    ids=["profile", "marginal", "search", "compensation", "eval"],
)  # fmt: skip
def test_every_count_of_blocks_may_be_all(
    world: World, tmp_path: Path, asked: tuple[str, ...]
) -> None:
    storage = f"search.storage=sqlite:///{tmp_path}/study.db"
    done = world.run(*asked, *[storage] * ("task=search" in asked))
    assert done.code == 0, done.out + done.err
    assert max(facts["blocks"] for facts in packing(done).values()) > 12


def edit_config(model: Path, **changes: Any) -> None:
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


LONG = ("eval.seq_lens=[128]", "gate.seq_lens=[128]", "eval.num_blocks=1", "task=evaluate")


@pytest.mark.parametrize(
    ("asked", "setting"),
    [
        (LONG, "eval.seq_lens"),
        (("task=profile", "profile.seq_len=128"), "profile.seq_len"),
        (("task=profile", "pruning=leave_one_out", "marginal.seq_len=128"), "marginal.seq_len"),
        (("task=expert_math", "profile.seq_len=128"), "profile.seq_len"),
    ],
)
def test_blocks_longer_than_the_positions_are_refused(
    world: World, tmp_path: Path, asked: tuple[str, ...], setting: str
) -> None:
    place = world.copied(tmp_path)
    edit_config(place.model, max_position_embeddings=127)
    error = place.run(*asked).failed()
    for word in ("128 tokens", "127 positions", str(place.model), f"lower {setting}"):
        assert word in error, (word, error)
    edit_config(place.model, max_position_embeddings=128)
    assert place.run(*asked).code == 0


def test_a_tokenizer_of_another_model_is_noticed_before_the_weights_are_read(
    world: World, tmp_path: Path
) -> None:
    """Its ids begin where this model's vocabulary ends."""
    place = world.copied(tmp_path)
    path = place.model / "tokenizer.json"
    values = json.loads(path.read_text())
    letter = values["model"]["vocab"]["e"]
    values["model"]["vocab"]["e"] = 300
    path.write_text(json.dumps(values))
    error = place.run().failed()
    for word in (str(place.model), "token 300", "vocab_size = 300", "tokenizer"):
        assert word in error, (word, error)
    assert letter < 300
    values["model"]["vocab"]["e"] = 299  # the last there is
    path.write_text(json.dumps(values))
    assert place.run("task=evaluate").code == 0
