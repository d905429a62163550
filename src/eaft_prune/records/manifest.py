"""manifest.json: what an exported checkpoint says of itself."""

from __future__ import annotations

import json
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eaft_prune import __version__
from eaft_prune.checkpoints.read import MANIFEST, read_json
from eaft_prune.core.types import KeepPlan, UserError


@dataclass(frozen=True)
class Manifest:
    """What an export says of itself."""

    path: Path
    digest: str
    base: Mapping[str, str]  # label, digest, and path or hub_id with revision
    files: Mapping[str, Mapping[str, Any]]  # of the model: name -> sha256, bytes
    records: Mapping[str, Mapping[str, Any]]  # of how it was made; not part of the digest
    plan: KeepPlan
    plan_digest: str
    compensation: str  # its level
    changed_tensors: Mapping[str, str]  # sha256 of those whose bytes are meant not to be the base's
    padded: bool  # layers of a ragged plan were filled up with experts never routed to


def read_manifest(path: Path) -> Manifest:
    """The manifest of an exported checkpoint; raises UserError where there is none."""
    values = read_json(path / MANIFEST)
    try:
        kept = tuple(tuple(ids) for ids in values["plan"]["kept"])
        return Manifest(
            path=path,
            digest=values["digest"],
            base=values["base"],
            files=values["files"],
            records=values["records"],
            plan=KeepPlan(kept, values["plan"]["n_experts"]),
            plan_digest=values["plan"]["digest"],
            compensation=str(values.get("compensation", {}).get("level", "none")),
            changed_tensors=dict(values.get("changed_tensors", {})),
            padded=any(values["padding"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path / MANIFEST} is not the manifest of an export, or of an older version: {error}"
        ) from None


def manifest_of(
    draft: Path,
    key: str,
    digest: str,
    plans: tuple[KeepPlan, KeepPlan],
    provenance: Mapping[str, Any],
    files: Mapping[str, str],
    records: Mapping[str, str],
) -> dict[str, Any]:
    """The contents of manifest.json; plans: what was asked for, and what the layers hold.

    files and records: name -> sha256 of what lies in `draft`.
    """
    plan, layout = plans
    return {
        "format": 1,
        "key": key,
        "digest": digest,
        "eaft_prune": __version__,
        **provenance,
        "plan": {"kept": plan.kept, "n_experts": plan.n_experts, "digest": plan.digest},
        "padding": [
            sorted({*ids} - {*kept}) for ids, kept in zip(layout.kept, plan.kept, strict=True)
        ],
        "files": _sizes(draft, files),
        "records": _sizes(draft, records),
    }


def as_json(value: Any) -> str:
    """JSON for files that people open."""
    return json.dumps(value, indent=2) + "\n"


def manifest_values(target: Path) -> dict[str, Any]:
    """manifest.json as it is; empty where there is none."""
    path = target / MANIFEST
    return read_json(path) if path.exists() else {}


def misfits(target: Path) -> str | None:
    """What of an export is not as its manifest says, by size, or None."""
    try:
        for name, facts in manifest_values(target)["files"].items():
            path = target / name
            if not path.exists() or path.stat().st_size != facts["bytes"]:
                return f"{path} is not as its manifest says"
    except (UserError, LookupError, TypeError, AttributeError) as error:
        return f"{target / MANIFEST} is not a manifest: {error}"
    return None


def strangers(path: Path, listed: Container[str]) -> list[str]:
    """Names of what lies in an export and its folders and is not `listed`."""
    there = (item for item in path.rglob("*") if item.is_symlink() or not item.is_dir())
    names = (item.relative_to(path).as_posix() for item in there)
    return sorted(name for name in names if name not in listed)


def _sizes(draft: Path, hashes: Mapping[str, str]) -> dict[str, Any]:
    return {
        name: {"sha256": sha, "bytes": (draft / name).stat().st_size}
        for name, sha in sorted(hashes.items())
    }
