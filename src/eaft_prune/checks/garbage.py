"""What of the store and of the exported checkpoints nobody needs, and its removal."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from eaft_prune.checkpoints.read import (
    MANIFEST,
    MAPPING,
    RECIPE,
    SCORES,
    file_hashes,
    model_digest,
    open_model,
    read_json,
)
from eaft_prune.checks.doctor import TRASH
from eaft_prune.core.outcome import RunSummary
from eaft_prune.core.store import FILES, Store, lock_of
from eaft_prune.core.types import UserError
from eaft_prune.records.manifest import strangers

_SHA256 = re.compile(r"\b[0-9a-f]{64}\b")
_BESIDE = (
    MANIFEST,
    MAPPING,
    RECIPE,
    SCORES,
    "README.md",
)  # what an export holds besides the files it lists
_DAY = 86400.0


@dataclass(frozen=True)
class Item:
    """A stage output or an exported checkpoint; it goes unless something keeps it."""

    path: Path
    bytes: int
    age_days: float
    kept_by: str | None  # None: nothing
    lock: FileLock

    @property
    def what(self) -> str:
        return (
            "checkpoint" if (self.path / MANIFEST).exists() else f"{self.path.parent.name} output"
        )


def needed(
    runs: Iterable[RunSummary], aliased: Iterable[str], lockfiles: Iterable[Path]
) -> dict[str, str]:
    """Stage keys, checkpoint digests and checkpoint paths -> who needs them.

    A run needs what it named if it is active in the tracker and FINISHED or RUNNING, if it carries
    the tag `keep`, or if an alias of a registered model points at it; a lockfile needs every sha256
    in its text.
    """
    named: dict[str, str] = {}
    for digest in aliased:
        named[digest] = "an alias"
    for file in lockfiles:
        named |= {sha: str(file) for sha in _SHA256.findall(file.read_text(errors="replace"))}
    pinned = set(aliased)
    for run in runs:
        finished = run.active and run.status in ("FINISHED", "RUNNING")
        tagged = run.tags.get("keep", "false").lower() not in ("", "false", "0", "no")
        if finished or tagged or run.run_id in pinned:
            for tag, value in run.tags.items():
                if tag.startswith(("stage.", "checkpoint.")):
                    named[value] = f"run {run.run_id[:8]} ({run.name})"
    return named


def lockfiles(places: Iterable[Path]) -> list[Path]:
    """Every *.lock.yaml under these directories, and these files themselves."""
    found: list[Path] = []
    for place in places:
        found += [place] if place.is_file() else sorted(place.rglob("*.lock.yaml"))
    return found


def survey_store(store: Store, needs: Mapping[str, str], days: float, now: float) -> list[Item]:
    """Every stage output, with what keeps it."""
    items = []
    for home in store.outputs():
        age = (now - home.stat().st_mtime) / _DAY
        keeps = needs.get(home.name)
        if not _SHA256.fullmatch(home.name) or any(f.name not in FILES for f in home.iterdir()):
            keeps = "it is not an output of this store"
        items.append(Item(home, _size(home), age, keeps or _young(age, days), lock_of(home)))
    return items


def survey_checkpoints(
    directory: Path,
    needs: Mapping[str, str],
    days: float,
    now: float,
    has_base: Callable[[str], bool],
) -> list[Item]:
    """Every export in a directory, with what keeps it; has_base(digest) is asked last."""
    items = []
    for manifest in sorted(directory.glob(f"[!.]*/{MANIFEST}")):
        export = manifest.parent
        age = (now - manifest.stat().st_mtime) / _DAY
        keeps = _keeps(export, needs) or _young(age, days) or _irreplaceable(export, has_base)
        lock = FileLock(export.with_name(f".{export.name}.lock"))
        items.append(Item(export, _size(export), age, keeps, lock))
    return items


def remove(item: Item) -> bool:
    """Move an item out of sight by one rename, then delete it; False if a run holds it now.

    A removed export leaves NAME.manifest.json: plan, settings and digests, from which it can be
    written again.
    """
    in_store = not (item.path / MANIFEST).exists()
    trash = (item.path.parents[1] if in_store else item.path.parent) / TRASH
    try:
        with item.lock.acquire(timeout=0):
            if not item.path.exists():
                return False
            trash.mkdir(exist_ok=True)
            if not in_store:
                shutil.copyfile(
                    item.path / MANIFEST,
                    item.path.with_name(f"{item.path.name}.manifest.json"),
                )
            away = trash / f"{item.path.parent.name}-{item.path.name}"
            item.path.rename(away)
    except Timeout:
        return False
    shutil.rmtree(away)
    if not any(trash.iterdir()):
        trash.rmdir()
    return True


def base_finder(paths: Iterable[Path]) -> Callable[[str], bool]:
    """Whether one of these directories is a checkpoint with a digest; each is hashed once."""
    digests: dict[Path, str] = {}

    def has_base(digest: str) -> bool:
        for path in candidates:
            if path not in digests:
                try:
                    digests[path] = model_digest(file_hashes(open_model(path), lambda done: None))
                except (UserError, OSError):
                    digests[path] = ""  # gone or damaged: nothing can be made from it
            if digests[path] == digest:
                return True
        return False

    candidates = sorted(set(paths))
    return has_base


def _keeps(export: Path, needs: Mapping[str, str]) -> str | None:
    try:
        manifest = read_json(export / MANIFEST)
    except UserError:
        return "its manifest is damaged"
    names = (str(export.resolve()), manifest.get("digest"), manifest.get("key"))
    return next((needs[name] for name in names if isinstance(name, str) and name in needs), None)


def _irreplaceable(export: Path, has_base: Callable[[str], bool]) -> str | None:
    """Why an export could not be written again, or is no longer only ours."""
    try:
        manifest = read_json(export / MANIFEST)
        files, base = manifest["files"], manifest["base"]["digest"]
        if others := strangers(export, {*files, *_BESIDE}):
            return f"it holds {others[0]}, which no export wrote"
        hashes = file_hashes(open_model(export), lambda done: None)
        if model_digest(hashes) != manifest["digest"]:
            return "its files were changed after the export"
    except (UserError, LookupError, TypeError) as error:
        return f"it is damaged: {error}"
    return (
        None if has_base(base) else f"its base {base[:12]} is nowhere: it could not be made again"
    )


def _young(age: float, days: float) -> str | None:
    return f"it is younger than {days:g} days" if age < days else None


def _size(directory: Path) -> int:
    return sum(item.stat().st_size for item in directory.rglob("*") if item.is_file())
