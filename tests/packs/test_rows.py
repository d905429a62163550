"""Rows are those of the file that was named: pyarrow's table in memory is the oracle."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import tiny

from eaft_prune.core.types import UserError
from eaft_prune.packs.pack_file import PackFile
from eaft_prune.packs.rows import check_column, count_rows, read_rows, read_texts

TEXTS = ["plain", "", "two\nlines", 'a "quote", a comma', "naïve 七", "NA", "null", "1", " x "]
CHAT: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "hi"}, {"role": "assistant", "channel": "final", "content": "y"}],
    [{"role": "developer", "content": ""}],
]
Write = Callable[[Path, list[str]], Path]


def file_of(path: Path, column: str = "text") -> PackFile:
    return PackFile("tools", path, column)


def read(path: Path, column: str = "text") -> list[Any]:
    return list(read_rows(file_of(path, column)))


def parquet(home: Path, texts: list[str]) -> Path:
    path = home / "a.parquet"
    pq.write_table(pa.table({"id": range(len(texts)), "text": texts}), path, row_group_size=2)
    return path


def json_lines(home: Path, texts: list[str]) -> Path:
    path = home / "a.jsonl"
    lines = [json.dumps({"id": i, "text": text}) for i, text in enumerate(texts)]
    path.write_text("\n\n".join(lines))  # empty lines are no rows
    return path


def comma_separated(home: Path, texts: list[str]) -> Path:
    path = home / "a.csv"
    with path.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([("id", "text"), *enumerate(texts)])
    return path


FORMATS: list[Write] = [parquet, json_lines, comma_separated]


@pytest.mark.parametrize("write", FORMATS)
def test_every_format_gives_the_rows_in_order(tmp_path: Path, write: Write) -> None:
    path = write(tmp_path, TEXTS)
    assert read(path) == TEXTS
    assert count_rows(file_of(path)) == len(TEXTS)
    assert check_column(file_of(path)) == "text"


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\r\x00")), min_size=1))
def test_formats_agree_on_any_text(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str]
) -> None:
    home = tmp_path_factory.mktemp("formats")
    for write in FORMATS:
        assert read(write(home, texts)) == texts, write.__name__


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    for write in (json_lines, comma_separated):
        path = write(tmp_path, TEXTS)
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
        assert read(path) == TEXTS


@pytest.mark.parametrize("name", ["tools[2]", "tools?", "tools*", "**", "{a,b}", "a::b", "hf:x y"])
@pytest.mark.parametrize("write", FORMATS)
def test_a_path_is_a_name_and_no_pattern(tmp_path: Path, name: str, write: Write) -> None:
    """Beside it lie files that the name would match as a pattern."""
    for beside in ("tools2", "toolsx", "tools", "a", "b"):
        path = write(tmp_path, ["another"])
        path.rename(path.with_stem(beside))
    path = write(tmp_path, ["named"])
    assert read(path.rename(path.with_stem(name))) == ["named"]


def table(**changes: Any) -> pa.Table:
    return pa.table({"text": TEXTS, **changes})


def test_other_columns_do_not_matter(tmp_path: Path) -> None:
    n = len(TEXTS)
    maps = pa.array([[("a", 1)]] * n, pa.map_(pa.string(), pa.int64()))
    tables = {
        "map": table(other=maps),
        "twice": pa.Table.from_arrays(
            [pa.array(range(n)), pa.array(TEXTS), pa.array(range(n))], names=["d", "text", "d"]
        ),
        "nested": table(**{"text.x": range(n), "textual": [{"text": "no"}] * n}),
        "first": pa.table({"text.x": ["no"] * n, "text": TEXTS}),
        "huggingface": table().replace_schema_metadata(
            {"huggingface": '{"info": {"features": {"text": {"_type": "Strange"}}}}'}
        ),
        "large": pa.table({"text": pa.array(TEXTS, pa.large_string())}),
        "dictionary": pa.table({"text": pa.array(TEXTS).dictionary_encode()}),
    }
    for name, one in tables.items():
        path = tmp_path / f"{name}.parquet"
        pq.write_table(one, path)
        assert read(path) == one["text"].to_pylist() == TEXTS, name


def test_messages_are_those_of_the_table_without_null(tmp_path: Path) -> None:
    path = tmp_path / "chat.parquet"
    pq.write_table(pa.table({"messages": CHAT}), path)
    assert pq.read_table(path)["messages"].to_pylist() != CHAT  # parquet fills keys with null
    assert read(path, "messages") == CHAT
    lines = tmp_path / "chat.jsonl"
    lines.write_text("".join(json.dumps({"messages": row}) + "\n" for row in CHAT))
    assert read(lines, "messages") == CHAT
    assert check_column(file_of(lines, "messages")) == "messages"


def test_null_is_absent_at_every_depth(tmp_path: Path) -> None:
    call = {"name": "f", "arguments": {"a": 1, "b": None}, "of": [None, {"c": None}]}
    row = [{"role": "assistant", "content": None, "tool_calls": [call]}]
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": row}))
    call = {"name": "f", "arguments": {"a": 1}, "of": [None, {}]}
    assert read(path, "messages") == [[{"role": "assistant", "tool_calls": [call]}]]


def test_rendering_is_asked_for_messages_only_and_its_refusal_names_the_row(tmp_path: Path) -> None:
    def roles(messages: Any) -> str:
        if messages[0]["role"] == "developer":
            raise UserError("no developers")
        return "+".join(message["role"] for message in messages)

    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in CHAT))
    rows = read_texts(file_of(path, "messages"), roles)
    assert next(rows) == "user+assistant"
    with pytest.raises(UserError, match=r"pack tools: .*chat\.jsonl row 1: no developers"):
        next(rows)
    assert list(read_texts(file_of(parquet(tmp_path, TEXTS)), roles)) == TEXTS


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": "b"', ["line 2", "not JSON"]),
        ("a.jsonl", b'{"text": "a"}\n["b"]', ["line 2", "not an object"]),
        ("a.jsonl", b'{"text": "a"}\n\n{"texts": "b"}', ["line 3", "no 'text'"]),
        ("a.jsonl", b'{"text": "a"}\n{"text": null}', ["row 1", "null"]),
        ("a.jsonl", b'{"text": "a"}\n{"text": [{"role": "user"}]}', ["row 1", "not text"]),
        ("a.jsonl", b'{"text": [{"role": "user"}]}\n{"text": [{"content": 1}]}', ["no role"]),
        ("a.jsonl", b'{"text": [{"role": "user"}]}\n{"text": []}', ["row 1", "[]"]),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}', ["line 2", "UTF-8"]),
        ("a.jsonl", b'{"text": "\\ud800"}', ["row 0", "surrogate"]),
        ("a.jsonl", b'{"text": [{"role": "user", "content": "\\ud800"}]}', ["row 0", "surrogate"]),
        ("a.jsonl", b'{"id": 1, "words": "x"}', ["no 'text'", "id (int), words (text)"]),
        ("a.jsonl", b"", ["no rows"]),
        ("a.csv", b"", ["CSV"]),
        ("a.csv", b"words,id\na,1\n", ["no 'text'", "words (text)"]),
        ("a.csv", b"text,text\na,b\n", ["2 columns named 'text'"]),
        ("a.csv", b"text,id\na,1,2\n", ["Expected 2 columns, got 3"]),
        ("a.csv", b"text,id\n\xff,1\n", ["UTF8"]),
        ("a.tsv", b"text\tid\na\t1\n", [".tsv", ".csv"]),
        ("a", b"text", ["no suffix", ".csv"]),
    ],
)
def test_what_is_no_pack_is_one_short_line(
    tmp_path: Path, name: str, content: bytes, said: list[str]
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read(path)
    for word in ["pack tools", str(path), *said]:
        assert word in str(caught.value), (word, str(caught.value))
    assert "\n" not in str(caught.value)


def test_a_long_value_is_not_repeated(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    long = [{"role": "user", "content": "x" * 35_000}]
    path.write_text(json.dumps({"text": "a"}) + "\n" + json.dumps({"text": long}))
    with pytest.raises(UserError) as caught:
        read(path)
    assert len(str(caught.value)) < 300
    assert "35,0" in str(caught.value)  # how long it is


def test_rows_are_streamed(tmp_path: Path) -> None:
    """One row group of 64 MB of text is read with a small part of that in pyarrow's memory."""
    path = tmp_path / "large.parquet"
    letters = [chr(97 + i % 26) * 16_000 + str(i) for i in range(4_000)]
    pq.write_table(pa.table({"text": letters}), path, compression="none", use_dictionary=False)
    del letters
    before, most, count = pa.total_allocated_bytes(), 0, 0
    for text in read_rows(file_of(path)):
        assert str(text).endswith(str(count))
        most, count = max(most, pa.total_allocated_bytes()), count + 1
    assert count == 4_000
    assert most - before < 24 << 20


def test_rendered_text_and_messages_are_the_same_rows(tmp_path: Path) -> None:
    """Of the demo's tokenizer: its template writes what the shipped packs hold."""
    from importlib.resources import files

    from eaft_prune.packs.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(Path(str(files("eaft_prune") / "demo" / "checkpoint")))
    chat = [
        [
            {"role": "user", "content": f"seven plus {i}"},
            {"role": "assistant", "channel": "analysis", "content": "the sum"},
            {
                "role": "assistant", "channel": "commentary", "recipient": "functions.f",
                "content_type": "<|constrain|>json", "content": '{"x": 1}',
            },
            {"role": "functions.f", "recipient": "assistant", "content": "nine"},
            {"role": "assistant", "channel": "final", "content": "equals"},
        ]
        for i in range(9)
    ]  # fmt: skip
    text = [
        f"<|start|>user<|message|>seven plus {i}<|end|>"
        "<|start|>assistant<|channel|>analysis<|message|>the sum<|end|>"
        "<|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>"
        '{"x": 1}<|call|>'
        "<|start|>functions.f to=assistant<|message|>nine<|end|>"
        "<|start|>assistant<|channel|>final<|message|>equals<|return|>"
        for i in range(9)
    ]
    path = tmp_path / "chat.parquet"
    pq.write_table(pa.table({"messages": chat}), path)
    assert list(read_texts(file_of(path, "messages"), tokenizer.render)) == text


@pytest.mark.parametrize(
    ("template", "said"),
    [(None, "chat_template"), ("{{ raise_exception('only two roles') }}", "only two roles"),
     ("{{ strftime_now(messages[0].content) }}", "date"), ("{{ 1 + 'a' }}", "operand")],
)  # fmt: skip
def test_a_template_that_refuses(tmp_path: Path, template: str | None, said: str) -> None:
    from eaft_prune.packs.tokenizer import load_tokenizer

    tiny.write_tokenizer(tmp_path)
    if template is not None:
        (tmp_path / "chat_template.jinja").write_text(template)
    with pytest.raises(UserError, match=said) as caught:
        load_tokenizer(tmp_path).render(CHAT[0])
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_template_is_told_the_same_day_on_every_day(tmp_path: Path) -> None:
    """gpt-oss's own writes the current date into a system message."""
    from eaft_prune.packs.tokenizer import load_tokenizer

    tiny.write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(
        """{{ "Current date: " + strftime_now("%Y-%m-%d") + strftime_now( '/%d %b' ) }}"""
    )
    rendered = load_tokenizer(tmp_path).render(CHAT[0])
    assert rendered == "Current date: 2025-08-05/05 Aug"


def written(home: Path) -> list[Path]:
    """Small packs of every format, of texts and of messages, compressed and not."""
    made = [write(home, TEXTS[:6]) for write in FORMATS]
    for compression in ("none", "zstd"):
        path = home / f"{compression}.parquet"
        pq.write_table(pa.table({"text": CHAT * 5}), path, compression=compression)
        made.append(path)
    return made


@given(
    which=st.integers(0, 4),
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1),
)
@settings(max_examples=300)
def test_whatever_bytes_a_pack_has_it_is_rows_or_one_line(
    which: int, flips: list[tuple[float, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    home = tmp_path_factory.getbasetemp() / "flipped"
    home.mkdir(exist_ok=True)
    path = written(home)[which]
    data = bytearray(path.read_bytes())
    for place, byte in flips[:4]:
        data[int(place * len(data))] = byte
    path.write_bytes(data)
    try:
        check_column(file_of(path))
        count_rows(file_of(path))
        assert all(isinstance(row, str | list) for row in read(path))
    except UserError as error:
        assert "\n" not in str(error)  # noqa: PT017


def test_names_of_columns_that_are_no_utf8(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a"], "other": ["b"]}), path)
    path.write_bytes(path.read_bytes().replace(b"other", b"oth\xffr"))
    with pytest.raises(UserError, match=r"a\.parquet is (damaged|not a parquet)"):
        check_column(file_of(path))


@pytest.mark.parametrize("depth", [100, 400, 100_000])
def test_json_lines_that_are_nested_deep(tmp_path: Path, depth: int) -> None:
    path = tmp_path / "a.jsonl"
    inner = "[" * depth + "]" * depth
    path.write_text(f'{{"text": [{{"role": "user", "content": {inner}}}]}}\n')
    with pytest.raises(UserError, match="line 1 is"):
        read(path)
