"""Files that appear whole, and stay."""

from __future__ import annotations

import errno
import os
from pathlib import Path

# a place that does not take what is to be written: permissions, a read-only disk, a file in the way
DENIED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)


def why_not_writable(directory: Path) -> str | None:
    """Why nothing can be put into a directory that may not be there yet, or None if it can."""
    there = next(place for place in (directory, *directory.parents) if place.exists())
    if not there.is_dir():
        return f"{there} is not a directory"
    return None if os.access(there, os.W_OK | os.X_OK) else f"{there} may not be written"


def sync(path: Path) -> None:
    """Flush a file, or a directory's entries, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Put a file in place whole."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_bytes(content if isinstance(content, bytes) else content.encode())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
