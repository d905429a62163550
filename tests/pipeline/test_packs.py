"""From a pack's file to blocks through the command line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support import runs
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


def test_the_file_that_is_named_is_the_one_that_is_read(world: World, tmp_path: Path) -> None:
    """Beside it lies one that its name would match as a pattern."""
    named = write_pack(tmp_path / "tools[2].parquet", runs.rows(60, 5))
    write_pack(tmp_path / "tools2.parquet", runs.rows(60, 6))
    plain = write_pack(tmp_path / "plain.parquet", runs.rows(60, 5))
    ask, place = ("task=evaluate", "packs.split=none"), world.elsewhere(tmp_path)
    files = f"packs.files={{tools: '{named}'}}"
    there = packing(place.run(*ask, files))
    assert there == packing(replace(place, packs={"tools": plain}).run(*ask))


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
