"""task=verify: an exported checkpoint against its manifest and its base, offline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from eaft_prune.checkpoints.families import family_of
from eaft_prune.checkpoints.families.base import with_table
from eaft_prune.checkpoints.read import (
    INDEX,
    SIGNATURE,
    ModelFiles,
    file_hashes,
    model_digest,
    open_model,
)
from eaft_prune.checks.records import check_records
from eaft_prune.checks.verify import (
    Finding,
    check_base,
    check_files,
    smoke_load,
    work,
)
from eaft_prune.config import ModelSettings, resolve_path
from eaft_prune.core.outcome import Outcome
from eaft_prune.core.types import Checkpoint, UserError
from eaft_prune.packs import sources
from eaft_prune.pipeline.session import Session
from eaft_prune.records.manifest import Manifest, read_manifest
from eaft_prune.records.signature import unsigned
from eaft_prune.report.terminal import listing


def run_verify(session: Session, out: Path) -> Outcome:
    """Hash every file, compare every kept byte with the base's, load and run it; list what differs.

    Nothing is taken from the store: what was hashed last week says nothing of today's disk.
    """
    settings = session.experiment.verify
    assert settings is not None, "config requires verify.* for this task"
    manifest = read_manifest(resolve_path(settings.path))
    base = open_model(_base_path(manifest, settings.base))
    family = family_of(base.config)
    base = with_table(family, base)
    hashes = _base_hashes(session, manifest, base)
    with session.bars.bar("verify", work(manifest), "B") as on_bytes:
        found = check_files(manifest, on_bytes)
        found += check_base(family, manifest, base, hashes, on_bytes)
    found += check_records(manifest)
    if settings.public_key and (why := unsigned(manifest.path, resolve_path(settings.public_key))):
        found.append(Finding(SIGNATURE, why))
    # with another config.json than the base's, loading might take whatever memory it asks for
    loads = settings.load and not any(item.file in ("config.json", INDEX) for item in found)
    if loads:
        found += smoke_load(family, manifest.path)
    checked = {
        "files": len(manifest.files) + len(manifest.records),
        "tensors": len(base.tensors),
        "compensation": manifest.compensation,
        "changed_tensors": len(manifest.changed_tensors),
        "loaded": loads,
        "signed": settings.public_key is not None,
    }
    text = _sentence(checked, len(found))
    if found:
        rows = [(item.file, item.what) for item in found]
        text = f"{listing(('file', 'what'), rows)}\n\n{text}"
    return Outcome(
        base=Checkpoint(base.path, manifest.base["digest"], "base"),
        checkpoint=Checkpoint(manifest.path, manifest.digest, "pruned"),
        facts={**checked, "findings": [asdict(item) for item in found]},
        text=text,
        differs=bool(found),
    )


def _base_path(manifest: Manifest, given: str | None) -> Path:
    """Where the base is: verify.base, else where the manifest says; never downloaded."""
    if given is not None:
        return resolve_path(given)
    where = {key: manifest.base.get(key) for key in ("path", "hub_id", "revision")}
    try:
        settings = ModelSettings(name=manifest.base["label"], **where)
        path = sources.model_path(settings, local_only=True)
        if not path.is_dir():
            raise UserError(f"{path} is not a directory")
    except (ValueError, OSError) as error:  # OSError: a name no disk takes
        raise UserError(
            f"{manifest.path} was cut from {manifest.base['label']} (digest "
            f"{manifest.base['digest'][:12]}), which is not where its manifest says "
            f"({' '.join(str(value) for value in where.values() if value)}): give verify.base=DIR"
        ) from error
    return path


def _base_hashes(session: Session, manifest: Manifest, base: ModelFiles) -> dict[str, str]:
    with session.bars.bar("hash base", base.weight_bytes, "B") as on_bytes:
        hashes = file_hashes(base, on_bytes)
    digest = model_digest(hashes)
    if digest != manifest.base["digest"]:
        raise UserError(
            f"{base.path} has digest {digest}, {manifest.path} was cut from a checkpoint with "
            f"{manifest.base['digest']}: give that one as verify.base"
        )
    return hashes


def _sentence(checked: Mapping[str, Any], findings: int) -> str:
    what = f"{checked['files']} files and {checked['tensors']} tensors"
    if changed := checked["changed_tensors"]:
        level = checked["compensation"]
        what += f" ({changed} changed by compensation={level}: of them their hashes)"
    what += ", loaded and run" if checked["loaded"] else ", not loaded"
    what += ", signed" if checked["signed"] and not findings else ""
    return f"VERIFIED  {what}" if not findings else f"DIFFERS  {findings} findings in {what}"
