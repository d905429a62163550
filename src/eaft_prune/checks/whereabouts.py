"""Whether a checkpoint or a file with a known digest is still anywhere that runs read it from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from eaft_prune.checkpoints.read import file_hashes, model_digest, open_model
from eaft_prune.core.digests import file_digest
from eaft_prune.core.types import UserError


@dataclass(frozen=True)
class Whereabouts:
    """Places that may hold inputs; what has not changed is hashed once."""

    bases: frozenset[Path]  # checkpoint directories
    files: frozenset[Path]  # packs and scores files
    _digests: dict[Path, tuple[object, str]] = field(default_factory=dict)

    def missing(self, base: str, files: Iterable[tuple[str, str]]) -> str | None:
        """The first that is nowhere, of a base by its digest and of files (name, digest)."""
        if not any(self.digest(path) == base for path in sorted(self.bases)):
            return f"base {base[:8]}"
        for name, sha in files:
            if not any(self.digest(path) == sha for path in sorted(self.files)):
                return f"{name} {sha[:8]}"
        return None

    def digest(self, path: Path) -> str:
        """Digest of a checkpoint or file as it is now; empty where it is gone or damaged."""
        try:
            state = _state(path)
            known = self._digests.get(path)
            if known is None or known[0] != state:
                known = state, _digest(path)
                self._digests[path] = known
            return known[1]
        except (UserError, OSError):
            return ""  # nothing can be made from it


def _state(path: Path) -> object:
    """What changes when a file, or one under a directory, does."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    stats = ((str(file), file.stat()) for file in files if not file.is_dir())
    return [(name, stat.st_size, stat.st_mtime_ns, stat.st_ino) for name, stat in stats]


def _digest(path: Path) -> str:
    if path.is_dir():
        return model_digest(file_hashes(open_model(path), lambda done: None))
    return file_digest(path)
