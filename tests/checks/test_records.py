"""A manifest whatever it holds: one UserError or findings; and what is not true in it is found."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.runs import Done, World

from eaft_prune.checkpoints.families import family_of
from eaft_prune.checkpoints.read import file_hashes, model_digest, open_model
from eaft_prune.checks.records import check_records
from eaft_prune.checks.verify import Finding, check_base, check_files, work
from eaft_prune.core.digests import digest, file_digest
from eaft_prune.core.types import UserError
from eaft_prune.records.manifest import misfits, read_manifest

pytest_plugins = ("support.worlds",)

Keys = tuple[str | int, ...]
DEEP: Any = json.loads("[" * 200 + "]" * 200)
GONE = object()
WRONG: dict[str, Any] = {
    "missing": GONE,
    "null": None,
    "text": "\n../../etc\0",
    "number": -1.5,
    "true": True,
    "huge": 10**4000,
    "list": [[[]]],
    "object": {"a": {"b": 1}},
    "nested": DEEP,
    "long": "x" * 100_000,
}
# what nothing in the directory or the base vouches for: docs/use.md says so
UNKNOWABLE = {
    (("made_from",), "missing"),
    (("made_from",), "null"),
}


def nothing(done: int) -> None:
    pass


@pytest.fixture(scope="module")
def quick(world: World) -> Done:
    """The quick pipeline in the shared store, and the checkpoint it wrote."""
    done = world.run()
    assert done.code == 0, done.out + done.err
    return done


@pytest.fixture
def export(quick: Done, tmp_path: Path) -> Path:
    """Its checkpoint, to be forged."""
    return Path(shutil.copytree(quick.result["checkpoint"]["path"], tmp_path / "pruned"))


@pytest.fixture(scope="module")
def verify(world: World) -> Callable[[Path], list[Finding]]:
    """All that task=verify checks of a checkpoint, but for loading it."""
    base = open_model(world.model)
    family, hashes = family_of(base.config), file_hashes(base, nothing)

    def verified(path: Path) -> list[Finding]:
        manifest = read_manifest(path)
        if manifest.base["digest"] != model_digest(hashes):
            raise UserError("was cut from another")
        assert work(manifest) >= 0
        found = check_files(manifest, nothing)
        found += check_base(family, manifest, base, hashes, nothing)
        return [*found, *check_records(manifest)]

    return verified


def keys_of(value: Any, path: Keys = ()) -> Iterator[Keys]:
    """Where everything in nested values lies."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        yield (*path, key)
        if isinstance(item, dict | list):
            yield from keys_of(item, (*path, key))


def changed(values: Any, path: Keys, to: Any) -> Any:
    values = copy.deepcopy(values)
    inner = values
    for key in path[:-1]:
        inner = inner[key]
    if to is GONE:
        del inner[path[-1]]
    else:
        inner[path[-1]] = to
    return values


def said(verified: Callable[[], list[Finding]]) -> list[str]:
    """What is wrong, found or raised."""
    try:
        return [item.what for item in verified()]
    except UserError as error:
        return [str(error)]


def at(values: Any, path: Keys) -> Any:
    for key in path:
        values = values[key]
    return values


def test_the_whole_is_as_it_should_be(
    export: Path, verify: Callable[[Path], list[Finding]]
) -> None:
    assert verify(export) == []


@pytest.mark.slow
def test_whatever_is_changed_in_a_manifest_is_an_error_or_a_finding(
    export: Path, verify: Callable[[Path], list[Finding]]
) -> None:
    path = export / "manifest.json"
    whole = json.loads(path.read_text())
    tried = 0
    for keys in keys_of(whole):
        for how, to in WRONG.items():
            if to == at(whole, keys) and type(to) is type(at(whole, keys)):
                continue
            path.write_text(json.dumps(changed(whole, keys, to)))
            tried += 1
            found = said(lambda: verify(export))
            assert all("\n" not in line and len(line) < 2000 for line in found), (keys, how)
            assert bool(found) != ((keys, how) in UNKNOWABLE), (keys, how)
            assert isinstance(misfits(export), str | None)
    assert tried > 800
    for text in ("", "[]", "null", "1", "{", '"x"'):
        path.write_text(text)
        with pytest.raises(UserError):
            verify(export)


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def forge_record(export: Path, name: str, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a record, and its hash in the manifest."""
    values = yaml.safe_load((export / name).read_text())
    change(values)
    (export / name).write_text(yaml.safe_dump(values))
    facts = {"sha256": file_digest(export / name), "bytes": (export / name).stat().st_size}
    edit(export / "manifest.json", lambda manifest: manifest["records"].update({name: facts}))


Forgery = tuple[str, Callable[[dict[str, Any]], None], str]
FORGED: list[Forgery] = [
    ("reap-recipe.yaml", lambda v: v.update(criterion="reap"), "its criterion is 'reap'"),
    ("reap-recipe.yaml", lambda v: v["base"].update(path="/x"), "its base is"),
    ("reap-recipe.yaml", lambda v: v["plan"].update(digest="0" * 64), "its plan is"),
    ("reap-recipe.yaml", lambda v: v["settings"]["pruning"].update(w_good=2.0), "pruning.w_good"),
    ("reap-recipe.yaml", lambda v: v["settings"].pop("pruning"), "its pruning."),
    ("reap-scores.yaml", lambda v: v.update(criterion="reap"), "its criterion is 'reap'"),
    ("reap-scores.yaml", lambda v: v["base"].update(digest="0" * 64), "its base is"),
    ("reap-scores.yaml", lambda v: v["scoring"].update(w_good=2.0), "scoring.w_good"),
    (
        "reap-scores.yaml",
        lambda v: [layer["positive_mass"].reverse() for layer in v["layers"]] and None,
        "its plan is not the one",
    ),
    ("reap-recipe.yaml", lambda v: v.update(format=2), "is no recipe file"),
]


@pytest.mark.parametrize("forgery", FORGED, ids=lambda f: f"{f[0][5:9]} {f[2]}")
def test_a_record_that_was_forged_with_its_hash_disagrees(
    export: Path, verify: Callable[[Path], list[Finding]], forgery: Forgery
) -> None:
    name, change, said = forgery
    forge_record(export, name, change)
    assert any(said in item.what for item in verify(export)), verify(export)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda made: made.update(model="0" * 64), "its key is of another base"),
        (lambda made: made.update(plan="0" * 64), "its key is of another plan"),
        (lambda made: made.update(compensation="0" * 64), "its key is of another compensation"),
    ],
)
def test_a_key_that_was_forged_with_what_it_is_made_from(
    export: Path,
    verify: Callable[[Path], list[Finding]],
    change: Callable[[dict[str, Any]], None],
    said: str,
) -> None:
    def forge(values: dict[str, Any]) -> None:
        change(values["made_from"])
        values["key"] = digest(values["made_from"])

    edit(export / "manifest.json", forge)
    assert [item.what for item in verify(export)] == [said]


def test_a_recipe_that_is_no_record_any_more(
    export: Path, verify: Callable[[Path], list[Finding]]
) -> None:
    edit(export / "manifest.json", lambda values: values["records"].pop("reap-recipe.yaml"))
    found = {item.what for item in verify(export) if item.file == "reap-recipe.yaml"}
    assert found == {"is not in the manifest", "is not among the records of manifest.json"}
    (export / "reap-recipe.yaml").unlink()
    assert any("reap-recipe.yaml is missing" in item.what for item in verify(export))


def test_a_file_that_is_a_link_out_is_not_followed(
    export: Path, verify: Callable[[Path], list[Finding]]
) -> None:
    shutil.move(export / "tokenizer.json", export.parent / "elsewhere")
    (export / "tokenizer.json").symlink_to(export.parent / "elsewhere")
    assert any("outside" in item.what for item in verify(export))


@pytest.mark.parametrize("task", ["noop", "prune"])
def test_what_every_way_of_exporting_writes_agrees(
    world: World, verify: Callable[[Path], list[Finding]], task: str
) -> None:
    how = [] if task == "noop" else ["pruning=frequency", "pruning.compensation=bias"]
    done = world.run(f"task={task}", *how)
    assert done.code == 0, done.out + done.err
    assert verify(Path(done.result["checkpoint"]["path"])) == []


def test_a_config_that_differs_is_not_loaded(world: World, export: Path) -> None:
    edit(export / "config.json", lambda config: config.update(num_hidden_layers=10**9))
    done = world.run("task=verify", f"verify.path={export}")
    assert done.code == 3, done.out + done.err
    assert done.result["facts"]["loaded"] is False
