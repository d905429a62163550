"""Objects of the user's modules, and the digest of the file they come from."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from eaft_prune.core.plugins import load_object, source_digest
from eaft_prune.core.types import UserError


def test_an_object_comes_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "answer = 42\n"
    (tmp_path / "plugin_in_cwd.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))  # undone at the end, also what load_object adds
    assert load_object("a.setting", "plugin_in_cwd:answer") == 42
    sha = hashlib.sha256(text.encode()).hexdigest()
    assert source_digest("a.setting", "plugin_in_cwd:answer") == sha
    # what was imported is what runs, whatever the file says later
    (tmp_path / "plugin_in_cwd.py").write_text("answer = 43\n")
    assert source_digest("a.setting", "plugin_in_cwd:answer") == sha


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("json", "not of the form module:name"),
        (":loads", "not of the form module:name"),
        ("json:", "not of the form module:name"),
        ("no_such_module_here:f", "cannot be imported"),
        ("json:no_such_name", "json has no no_such_name"),
    ],
)
def test_what_is_not_there_is_named(where: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        load_object("a.setting", where)
    assert str(caught.value).startswith(f"a.setting = {where!r}")


def test_what_has_no_source_has_no_digest() -> None:
    with pytest.raises(UserError, match="no source file"):
        source_digest("a.setting", "time:sleep")
