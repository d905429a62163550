"""The checker: numbers, choices and words, in the final message alone."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from eaft_prune.core.types import UserError
from eaft_prune.packs.answer import is_right
from eaft_prune.packs.pack_file import PackFile
from eaft_prune.packs.rows import read_answers


def turn(final: str) -> str:
    thought = "<|channel|>analysis<|message|>42? B? Paris?<|end|><|start|>assistant"
    return f"{thought}<|channel|>final<|message|>{final}<|return|>"


@pytest.mark.parametrize(
    ("final", "answer", "right"),
    [
        ("So it is 42.", "42", True),
        ("So it is 42, or 43.", "42", False),
        ("That is $1,234.50", "1234.5", True),
        ("-7", "7", False),
        ("none", "42", False),
        ("The answer is **B**.", "B", True),
        ("A is wrong, so C", "B", False),
        ("BAD", "B", False),
        ("Of France:\nParis.", "paris", True),
        ("It is Paris", "Paris", True),
        ("Comparis", "Paris", False),
        ("Paris is not it: Rome", "Paris", False),
        ("", "Paris", False),
    ],
)
def test_final_messages(final: str, answer: str, right: bool) -> None:
    assert is_right(turn(final), answer) == right


def test_what_is_thought_is_no_answer() -> None:
    assert not is_right("<|channel|>analysis<|message|>It is 42.<|end|>", "42")
    assert not is_right("<|channel|>analysis<|message|>It is 42.", "42")


def file(tmp_path: Path, name: str, **columns: list[object]) -> PackFile:
    path = tmp_path / name
    table = pa.table({"text": ["x", "y", "z"], **columns})
    if name.endswith("parquet"):
        pq.write_table(table, path)
    elif name.endswith("csv"):
        from pyarrow import csv

        csv.write_csv(table, path)
    else:
        import json

        path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    return PackFile("p", path, "text")


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.csv"])
def test_answers_of_every_kind_of_file(tmp_path: Path, name: str) -> None:
    assert read_answers(file(tmp_path, name, answer=["B", "12", ""])) == ["B", "12", None]
    assert read_answers(file(tmp_path, f"none.{name}")) == []


def test_numbers_are_answers_and_lists_are_not(tmp_path: Path) -> None:
    assert read_answers(file(tmp_path, "n.parquet", answer=[1, None, 3])) == ["1", None, "3"]
    with pytest.raises(UserError, match="row 0: answer holds"):
        read_answers(file(tmp_path, "l.parquet", answer=[[1], [2], [3]]))
