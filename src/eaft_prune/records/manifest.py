"""manifest.json: what an exported checkpoint says of itself."""

from __future__ import annotations

import json
import os
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, ValidationError

from eaft_prune import __version__
from eaft_prune.checkpoints.read import MANIFEST, read_json
from eaft_prune.config import Settings
from eaft_prune.config.base import Name, Positive
from eaft_prune.core.foreign import is_plain_name
from eaft_prune.core.text import shortened
from eaft_prune.core.types import KeepPlan, UserError

Line = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]*$", max_length=1024)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Id = Annotated[int, Field(ge=0, lt=2**15)]  # traces hold experts as int16


class _Part(Settings):
    """Part of a manifest: what a later version adds is passed over."""

    model_config = ConfigDict(extra="ignore")


class _File(_Part):
    sha256: Sha256
    bytes: Annotated[int, Field(ge=0, lt=2**63)]


class _Base(_Part):
    label: Name
    digest: Sha256
    path: Line | None = None
    hub_id: Line | None = None
    revision: Line | None = None


class _Plan(_Part):
    kept: tuple[tuple[Id, ...], ...]
    n_experts: Annotated[int, Field(ge=1, le=2**15)]
    digest: Sha256


class _Compensation(_Part):
    level: Literal["none", "bias", "down_proj", "experts"] = "none"


class MadeFrom(_Part):
    """All that an export is made from: the manifest's key is the digest of this object."""

    stage: Literal["export"]
    version: Positive
    model: Sha256
    plan: Sha256
    max_shard_bytes: Positive
    compensation: Sha256 | None = None


def _inside(name: str) -> str:
    if not is_plain_name(name):
        raise ValueError("is not the name of a file in this directory")
    return name


Files = dict[Annotated[Line, AfterValidator(_inside)], _File]


class _ManifestFile(_Part):
    format: Annotated[int, Field(ge=1, le=1)]  # as a Literal it would take true
    key: Line
    digest: Sha256
    eaft_prune: Line
    base: _Base
    plan: _Plan
    padding: tuple[tuple[Id, ...], ...]
    files: Files
    records: Files
    criterion: Line | None = None
    pruning: dict[str, Any] | None = None
    compensation: _Compensation = _Compensation()
    changed_tensors: dict[str, Sha256] = Field(default_factory=dict)
    made_from: MadeFrom | None = None  # older exports do not say


@dataclass(frozen=True)
class Manifest:
    """What an export says of itself."""

    path: Path
    version: str  # of eaft_prune
    key: str
    made_from: Mapping[str, Any] | None  # what the key is the digest of
    digest: str
    base: Mapping[str, str]  # label, digest, and path or hub_id with revision
    files: Mapping[str, Mapping[str, Any]]  # of the model: name -> sha256, bytes
    records: Mapping[str, Mapping[str, Any]]  # of how it was made; not part of the digest
    plan: KeepPlan
    plan_digest: str
    padding: tuple[tuple[int, ...], ...]  # a layer's experts never routed to, which fill it up
    criterion: str | None
    pruning: Mapping[str, Any] | None  # the settings that made the plan
    compensation: str  # its level
    changed_tensors: Mapping[str, str]  # sha256 of those whose bytes are meant not to be the base's

    @property
    def padded(self) -> bool:
        """Whether layers of a ragged plan were filled up."""
        return any(self.padding)


def read_manifest(path: Path) -> Manifest:
    """The manifest of an exported checkpoint; raises UserError where there is none."""
    text = json.dumps(read_json(path / MANIFEST))
    try:
        file = _ManifestFile.model_validate_json(text, strict=True)
        plan = KeepPlan(file.plan.kept, file.plan.n_experts)
    except ValidationError as error:
        first = error.errors()[0]
        where = shortened(".".join(map(str, first["loc"])))
        raise _no_manifest(path, f"{where}: {first['msg']}") from None
    except UserError as error:
        raise _no_manifest(path, shortened(str(error), 200)) from None
    values = file.model_dump(exclude_none=True)
    return Manifest(
        path=path,
        version=file.eaft_prune,
        key=file.key,
        made_from=values.get("made_from"),
        digest=file.digest,
        base=values["base"],
        files=values["files"],
        records=values["records"],
        plan=plan,
        plan_digest=file.plan.digest,
        padding=file.padding,
        criterion=file.criterion,
        pruning=file.pruning,
        compensation=file.compensation.level,
        changed_tensors=file.changed_tensors,
    )


def _no_manifest(path: Path, why: str) -> UserError:
    return UserError(
        f"{path / MANIFEST} is not the manifest of an export, or of an older version: {why}"
    )


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
        files = read_manifest(target).files
    except UserError as error:
        return str(error)
    for name, facts in files.items():
        path = target / name
        if not path.is_file() or path.stat().st_size != facts["bytes"]:
            return f"{path} is not as its manifest says"
    return None


def strangers(path: Path, listed: Container[str]) -> list[str]:
    """Names of what lies in an export and its folders and is not `listed`; no link is entered."""
    found, folders = [], [path]
    while folders:
        for item in os.scandir(folders.pop()):
            if item.is_dir(follow_symlinks=False):
                folders.append(Path(item.path))
            elif (name := Path(item.path).relative_to(path).as_posix()) not in listed:
                found.append(name)
    return sorted(found)


def _sizes(draft: Path, hashes: Mapping[str, str]) -> dict[str, Any]:
    return {
        name: {"sha256": sha, "bytes": (draft / name).stat().st_size}
        for name, sha in sorted(hashes.items())
    }
