"""Files that somebody else made: which of them are opened, and how much of one is parsed."""

from __future__ import annotations

import json
import stat
from pathlib import Path, PurePosixPath
from typing import Any

from eaft_prune.core.types import UserError

_MOST_JSON = 100_000_000  # bytes
_DEEPEST = 64  # whoever walks what was read may recurse
_TOO_DEEP = object()
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def check_regular(path: Path) -> int:
    """Bytes of a file; raises UserError where there is none, or opening it could wait forever."""
    try:
        found = path.stat()
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (OSError, ValueError) as error:  # ValueError: a zero in its name
        why = getattr(error, "strerror", None) or error
        raise UserError(f"{str(path)!r} cannot be read: {why}") from None
    if not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "something else")
        raise UserError(f"{path} is {kind}, not a file")
    return found.st_size


def is_plain_name(name: str) -> bool:
    """Whether a relative POSIX name stays below the directory that it is in."""
    parts = PurePosixPath(name).parts
    return bool(parts) and not name.startswith("/") and ".." not in parts and "\0" not in name


def check_inside(root: Path, name: str) -> None:
    """Raise UserError unless `name` is a file whose bytes lie in `root`.

    A link may lead to another file of `root`, or to a blob where `root` is a snapshot of the hub's
    cache (snapshots/REVISION/NAME -> ../../blobs/SHA): what is elsewhere is not of this directory.
    """
    if not is_plain_name(name):
        raise UserError(f"{root} names {name!r}, which is not a file of that directory")
    path, home = root / name, root.resolve()
    try:
        real = path.resolve()
    except (OSError, RuntimeError):  # a loop
        raise UserError(f"{path} is a link that leads nowhere") from None
    cached = home.parent.name == "snapshots" and real.parent == home.parents[1] / "blobs"
    if home not in real.parents and not cached:
        raise UserError(f"{path} is a link to {real}, outside its directory: copy that file there")
    check_regular(path)


def parsed_json(path: Path) -> Any:
    """The JSON in a file; raises UserError where it holds none, or one too large or too deep."""
    size = check_regular(path)
    if size > _MOST_JSON:
        raise UserError(f"{path} has {size:,} bytes: more JSON than {_MOST_JSON:,} is not read")
    return json_in(path.read_bytes(), f"{path} is not JSON")


def json_in(content: bytes, refused: str) -> Any:
    """The JSON that UTF-8 bytes hold; raises UserError, `refused` and why, where they do not."""
    try:
        value = json.loads(content.decode())
    except RecursionError:
        value = _TOO_DEEP
    except ValueError as error:  # not JSON, not UTF-8, or a number of thousands of digits
        raise UserError(f"{refused}: {error}") from None
    if value is _TOO_DEEP or is_deep(value):
        raise UserError(f"{refused}: it is nested deeper than {_DEEPEST} levels")
    return value


def is_deep(value: Any) -> bool:
    """Whether parsed JSON has more levels than whoever walks it can be relied on to bear."""
    level = [value]
    for _ in range(_DEEPEST + 1):
        inner = [
            v.values() if isinstance(v, dict) else v for v in level if isinstance(v, dict | list)
        ]
        level = [item for items in inner for item in items if isinstance(item, dict | list)]
    return bool(level)
