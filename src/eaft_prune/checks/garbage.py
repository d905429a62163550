"""What of the store and of the exported checkpoints nobody needs, and its removal."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from filelock import FileLock, Timeout

from eaft_prune.checkpoints.read import MANIFEST, MAPPING, RECIPE, SCORES, read_json
from eaft_prune.checks.doctor import TRASH
from eaft_prune.checks.needs import SHA256, SHORT, Needs
from eaft_prune.checks.whereabouts import Whereabouts
from eaft_prune.core.store import FILES, RECORD, Store, lock_of
from eaft_prune.core.types import UserError
from eaft_prune.records.manifest import strangers
from eaft_prune.records.recipe import read_recipe

# what an export holds besides the files it lists
_BESIDE = (MANIFEST, MAPPING, RECIPE, SCORES, "README.md")
_KEPT_FOR = {"evaluate": "blocks", "likeliest": "evaluation"}  # stage -> one of its inputs
_DAY = 86400.0
_AT_ONCE = 64  # items whose locks are held while the tracker is asked what runs need now


@dataclass(frozen=True)
class Item:
    """A stage output or an exported checkpoint; it goes unless something keeps it."""

    path: Path
    what: str
    name: str  # for people
    names: tuple[str, ...]  # by which runs and lockfiles know it
    bytes: int
    age_days: float
    lock: FileLock
    own: Callable[[], str | None]  # what keeps it whoever needs it; asked last, as it may hash
    trash: Path
    record: Path | None = None  # stays when it goes: from it an export can be written again


def keeps(item: Item, needs: Needs, days: float) -> str | None:
    """Why an item stays now, or None."""
    young = f"it is younger than {days:g} days" if item.age_days < days else None
    return needs.keep(item.names) or young or item.own()


def survey_store(store: Store, now: float) -> list[Item]:
    """Every stage output."""
    items = []
    for home in store.outputs():
        items.append(
            Item(
                path=home,
                what="stage output",
                name=_shown(home),
                names=_names_of_output(home),
                bytes=_size(home),
                age_days=_age(home, now),
                lock=lock_of(home),
                own=partial(_own_of_output, home),
                trash=store.root / TRASH,
            )
        )
    return items


def survey_checkpoints(directory: Path, where: Whereabouts, now: float) -> list[Item]:
    """Every export in a directory."""
    items = []
    for manifest in sorted(directory.glob(f"[!.]*/{MANIFEST}")):
        export = manifest.parent
        items.append(
            Item(
                path=export,
                what="checkpoint",
                name=export.name,
                names=_names_of_export(export),
                bytes=_size(export),
                age_days=_age(manifest, now),
                lock=FileLock(export.with_name(f".{export.name}.lock")),
                own=partial(_irreplaceable, export, where),
                trash=directory / TRASH,
                record=export.with_name(f"{export.name}.{MANIFEST}"),
            )
        )
    return items


def remove(
    items: Sequence[Item], why_now: Callable[[], Callable[[Item], str | None]]
) -> list[str | None]:
    """Move items out of sight, each by one rename, then delete them; per item why it stayed.

    why_now: reads again what runs need, and gives what keeps an item. It is asked while the items'
    locks are held, so that no run can come between its answer and the rename.
    """
    found: list[str | None] = []
    for first in range(0, len(items), _AT_ONCE):
        found += _remove(items[first : first + _AT_ONCE], why_now)
    for trash in {item.trash for item in items}:
        if trash.exists() and not any(trash.iterdir()):
            trash.rmdir()
    return found


def _remove(
    items: Sequence[Item], why_now: Callable[[], Callable[[Item], str | None]]
) -> list[str | None]:
    reasons: dict[Path, str | None] = {}
    away = []
    with ExitStack() as held:
        for item in items:
            try:
                held.enter_context(item.lock.acquire(timeout=0))
            except Timeout:
                reasons[item.path] = "a run holds it now"
            except OSError as error:
                reasons[item.path] = f"its lock cannot be taken: {error.strerror}"
        keeping = why_now()
        for item in items:
            if item.path in reasons:
                continue
            try:
                reasons[item.path] = keeping(item) or _move(item)
            except OSError as error:
                reasons[item.path] = f"it cannot be moved: {error.strerror}"
            if reasons[item.path] is None:
                away.append(item)
    for item in away:
        try:
            shutil.rmtree(_away(item))
        except OSError as error:
            reasons[item.path] = f"some of it is left in {item.trash}: {error.strerror}"
    return [reasons[item.path] for item in items]


def _move(item: Item) -> str | None:
    if not item.path.exists():
        return "it is gone"
    item.trash.mkdir(exist_ok=True)
    if item.record is not None:
        shutil.copyfile(item.path / MANIFEST, item.record)
    item.path.rename(_away(item))
    return None


def _away(item: Item) -> Path:
    return item.trash / f"{item.path.parent.name}-{item.path.name}"


def _names_of_output(home: Path) -> tuple[str, ...]:
    """Its key, and what else it is kept for.

    Of an evaluation the digest of its blocks, by which a search names its own; of the base's
    likeliest tokens the key of the evaluation that they were made with.
    """
    try:
        inputs = json.loads((home / RECORD).read_text())["identity"]["inputs"]
        other = inputs[_KEPT_FOR[home.parent.name]]
    except (OSError, ValueError, LookupError, TypeError):
        other = None  # nothing else, or damaged: only a key can be needed
    return (home.name, other) if isinstance(other, str) else (home.name,)


def _names_of_export(export: Path) -> tuple[str, ...]:
    try:
        manifest = read_json(export / MANIFEST)
    except UserError:
        manifest = {}  # it stays: `_irreplaceable`
    names = (str(export.resolve()), manifest.get("digest"), manifest.get("key"))
    return tuple(name for name in names if isinstance(name, str))


def _shown(path: Path) -> str:
    """The last two parts of a path, a digest by its first digits."""
    name = path.name[:SHORT] if SHA256.fullmatch(path.name) else path.name
    return f"{path.parent.name} {name}"


def _linked(*places: Path) -> str | None:
    link = next((place for place in places if place.is_symlink()), None)
    if link is None:
        return None
    return f"{_shown(link)} is a symbolic link: what it points at is not ours"


def _own_of_output(home: Path) -> str | None:
    if link := _linked(home, home.parent):
        return link
    strange = not SHA256.fullmatch(home.name) or any(f.name not in FILES for f in home.iterdir())
    return f"{_shown(home)} is not an output of this store" if strange else None


def _irreplaceable(export: Path, where: Whereabouts) -> str | None:
    """Why an export could not be written again, or is no longer only ours."""
    if link := _linked(export):
        return link
    try:
        manifest = read_json(export / MANIFEST)
        files, base = manifest["files"], manifest["base"]["digest"]
        if others := strangers(export, {*files, *_BESIDE}):
            return f"{export.name} holds {others[0]}, which no export wrote"
        if where.digest(export) != manifest["digest"]:
            return f"the files of {export.name} were changed after the export"
        recipe = read_recipe(export / RECIPE)
    except (UserError, LookupError, TypeError) as error:
        return f"{export.name} is damaged: {error}"
    inputs = [(f"pack {name}", sha) for name, sha in recipe.packs.items()]
    if recipe.scores is not None:
        inputs.append(("scores", recipe.scores))
    lost = where.missing(base, inputs)
    return lost and f"{export.name} could not be made again: its {lost} is nowhere"


def _age(path: Path, now: float) -> float:
    return (now - path.stat().st_mtime) / _DAY


def _size(directory: Path) -> int:
    return sum(item.lstat().st_size for item in directory.rglob("*") if item.is_file())
