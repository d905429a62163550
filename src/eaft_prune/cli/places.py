"""Directories that hold options: the package's conf/ and sweeps/, and those of the user."""

from __future__ import annotations

from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

from eaft_prune.core.types import UserError

SEARCHPATH = "hydra.searchpath"
SWEEPS = "sweeps"


def config_root() -> Path:
    """The directory that holds conf/ and sweeps/: in a wheel the package, else the repository."""
    package = Path(__file__).resolve().parents[1]
    for root in (package, package.parents[1]):
        if (root / "conf" / "config.yaml").is_file():
            return root
    raise FileNotFoundError(f"neither {package} nor {package.parents[1]} holds conf/config.yaml")


def groups() -> dict[str, Path]:
    """Every group with the directory of the options that the package brings."""
    root = config_root()
    own = {path.name: path for path in sorted((root / "conf").iterdir()) if path.is_dir()}
    return {**own, SWEEPS: root / SWEEPS}


def absolute(place: str) -> str:
    scheme, separator, path = place.partition("://")
    if scheme == "pkg" and separator:
        folder_of(place)
        return place
    if scheme != "file" or not separator:
        raise UserError(f"{SEARCHPATH}: {place!r} must begin with file:// or pkg://")
    found = Path(path).expanduser().absolute()
    if not found.is_dir():
        raise UserError(f"{SEARCHPATH}: {place!r}: no such directory")
    return f"file://{found}"


def folder_of(place: str) -> Traversable:
    scheme, _, path = place.partition("://")
    if scheme == "file":
        return Path(path)
    try:
        return resources.files(path)
    except ModuleNotFoundError as error:
        raise UserError(f"{SEARCHPATH}: {place!r}: {error}") from None


def options_in(folder: Traversable) -> list[str]:
    if not folder.is_dir():
        return []
    names = sorted(item.name for item in folder.iterdir() if item.name.endswith(".yaml"))
    return [name.removesuffix(".yaml") for name in names if not name.startswith("_")]
