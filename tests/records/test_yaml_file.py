"""Recipes, scores and locks of strangers: whatever they hold, one line says why it is not read."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eaft_prune.core.types import UserError
from eaft_prune.records.lock import read_lock
from eaft_prune.records.recipe import read_recipe
from eaft_prune.records.scores import read_scores

LAUGHS = "a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol, lol]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 30)
)
BOMBS = {
    "aliases": LAUGHS,
    "one alias": "format: 1\nplan: &a {}\nsettings: *a\n",
    "a loop": "&a {format: 1, settings: *a}",
    "merge keys": "a: &a {x: 1}\nb: {<<: *a}\n",
    "deep": "[" * 20_000,
    "deep blocks": "".join(" " * n + "a:\n" for n in range(600)),
    "a number of 5000 digits": "format: " + "9" * 5000,
    "a class": "!!python/object/apply:os.system ['true']",
    "a wrong date": "format: 2020-99-99",
    "not UTF-8": b"\xff\xfe\x00",
    "binary": "format: \x00",
    "nothing": "",
    "a list": "[]",
}


@pytest.mark.parametrize("read", [read_recipe, read_scores, read_lock], ids=lambda f: f.__name__)
@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_is_one_line(bomb: str, read: Callable[[Path], Any], tmp_path: Path) -> None:
    text = BOMBS[bomb]
    path = tmp_path / "file.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=r"file\.yaml") as caught:
        read(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700
    assert ("aliases are not read" in str(caught.value)) == ("*a" in str(text))


@pytest.mark.parametrize("read", [read_recipe, read_scores, read_lock], ids=lambda f: f.__name__)
@pytest.mark.parametrize("what", ["pipe", "directory", "absent", "huge"])
def test_what_is_no_readable_file_is_one_line(
    what: str, read: Callable[[Path], Any], tmp_path: Path
) -> None:
    path = tmp_path / what
    if what == "pipe":
        os.mkfifo(path)
    elif what == "directory":
        path.mkdir()
    elif what == "huge":
        with path.open("wb") as file:
            file.truncate(10**11)  # sparse
    with pytest.raises(UserError, match=f"{what} cannot be read"):
        read(path)
