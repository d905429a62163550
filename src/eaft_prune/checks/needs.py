"""Who needs what of the store and of the exported checkpoints: runs, aliases, lockfiles."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from eaft_prune.core.outcome import RunSummary

SHA256 = re.compile(r"\b[0-9a-f]{64}\b")
SHORT = 8  # digits of a digest that people are shown
# what a run says that it needs; NEEDS: every output made from the one with this digest
NEEDS = "needs."
_NAMING = ("stage.", "checkpoint.", NEEDS)


@dataclass(frozen=True)
class Needs:
    """Stage keys, digests of outputs and checkpoints, and paths of those, by who named them."""

    by: Mapping[str, str] = field(default_factory=dict)  # -> who needs it
    once: Mapping[str, str] = field(default_factory=dict)  # -> who named it, and counts no more

    def keep(self, names: Iterable[str]) -> str | None:
        """Who needs what goes by one of these names, or None."""
        return next((self.by[name] for name in names if name in self.by), None)

    def lost(self, names: Iterable[str]) -> str:
        """Why nobody needs what goes by these names."""
        return next((self.once[name] for name in names if name in self.once), "no run names it")


def needed(runs: Iterable[RunSummary], aliased: Iterable[str], lockfiles: Iterable[Path]) -> Needs:
    """What is needed now.

    A run needs what it named if it is active in the tracker and FINISHED or RUNNING, if it carries
    the tag `keep`, or if an alias of a registered model points at it; a lockfile needs every sha256
    in its text.
    """
    pinned = set(aliased)
    by, once = dict.fromkeys(pinned, "an alias"), dict[str, str]()
    for file in lockfiles:
        by |= {sha: str(file) for sha in SHA256.findall(file.read_text(errors="replace"))}
    for run in runs:
        finished = run.active and run.status in ("FINISHED", "RUNNING")
        tagged = run.tags.get("keep", "false").lower() not in ("", "false", "0", "no")
        who = f"run {run.run_id[:SHORT]} ({run.name})"
        counts = finished or tagged or run.run_id in pinned
        for tag, value in run.tags.items():
            if tag.startswith(_NAMING) and counts:
                by[value] = who
            elif tag.startswith(_NAMING):
                once[value] = f"{who} is {run.status if run.active else 'deleted'}"
    return Needs(by, once)


def lockfiles(places: Iterable[Path]) -> list[Path]:
    """Every *.lock.yaml under these directories, and these files themselves."""
    found: list[Path] = []
    for place in places:
        found += [place] if place.is_file() else sorted(place.rglob("*.lock.yaml"))
    return found
