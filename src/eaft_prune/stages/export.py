"""Base checkpoint + keep plan -> a smaller checkpoint directory, whole or not at all."""

from __future__ import annotations

import errno
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from eaft_prune.checkpoints.cut import cut, router_biases
from eaft_prune.checkpoints.families.base import Family
from eaft_prune.checkpoints.pad import check_switches, padded, with_routers_off
from eaft_prune.checkpoints.read import (
    MANIFEST,
    MAPPING,
    ModelFiles,
    TensorEntry,
    model_digest,
    open_model,
    tensor_bytes,
)
from eaft_prune.checkpoints.slice import (
    Slices,
    copy_file,
    sliced_bytes,
    write_sliced,
    write_text,
)
from eaft_prune.checkpoints.token_tables import with_tables
from eaft_prune.core.files import sync
from eaft_prune.core.types import KeepPlan, UserError
from eaft_prune.records.card import FILE as CARD
from eaft_prune.records.card import card
from eaft_prune.records.manifest import (
    as_json,
    manifest_of,
    manifest_values,
    misfits,
    read_manifest,
)

VERSION = 2


@dataclass(frozen=True)
class Exported:
    """A written checkpoint: where, its digest, and whether it was there already."""

    path: Path
    digest: str
    cached: bool
    bytes_written: int
    seconds: float


@dataclass(frozen=True)
class Target:
    """Where an export goes, and what goes there besides the base's own bytes."""

    path: Path
    key: str  # digest of all that it is made from: a finished export with the same is used again
    max_shard_bytes: int
    provenance: Mapping[str, Any]  # how it was made, `base` at least: goes into the manifest
    # name -> text; the manifest lists their hashes, the checkpoint's digest leaves them out
    files_beside: Mapping[str, str] = field(default_factory=dict)
    # layers of a ragged plan are filled up to the largest with experts never routed to
    pad_ragged: bool = False
    # where the bytes of tensors lie that are not the base's: of all experts written
    changed: Mapping[str, TensorEntry] = field(default_factory=dict)

    def layout(self, plan: KeepPlan) -> KeepPlan:
        """The experts that the layers hold."""
        return padded(plan) if self.pad_ragged else plan


def export(
    family: Family,
    source: ModelFiles,
    plan: KeepPlan,
    target: Target,
    on_bytes: Callable[[int], None],
) -> Exported:
    """Write `source` with only the plan's experts; expert bytes are copied, not redone.

    Raises UserError where the target's path holds anything else, the plan is ragged and not padded,
    or the disk is full; the source is only read.
    """
    layout, path, changed = target.layout(plan), target.path, target.changed
    if layout.uniform_keep_n is None:
        counts = sorted({len(ids) for ids in plan.kept})
        switches = router_biases(family, source) is not None
        raise UserError(
            f"the plan keeps {counts} experts in different layers; a {family.model_type} "
            "checkpoint holds one number for all layers: evaluate it with eval.candidates=[masked]"
            + (", or fill the layers up with export.pad_ragged=true" if switches else "")
        )
    check_outside(path, source.path)
    started = time.perf_counter()
    biases = () if layout == plan else check_switches(family, source)
    kept = cut(family, source, layout)
    slices = {**kept.slices, **dict.fromkeys(changed)}
    base, source = source, replace(kept.files, tensors={**kept.files.tensors, **changed})
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.draft")
    scratch = path.with_name(f".{path.name}.router")
    with FileLock(path.with_name(f".{path.name}.lock")):
        if path.exists():
            return _existing(path, target.key)
        shutil.rmtree(draft, ignore_errors=True)  # the lock is held: it is a dead run's
        scratch.unlink(missing_ok=True)
        _check_space(source, slices, path)
        draft.mkdir()
        try:
            tensors = with_tables(source, kept.tables, layout, scratch)
            if biases:
                tensors = with_routers_off(tensors, biases, plan, scratch)
            digest, written = _write(family, tensors, slices, plan, draft, target, on_bytes)
            said = card(base, open_model(draft), plan, layout, target.provenance)
            write_text(draft / CARD, said)
            draft.rename(path)
            sync(path.parent)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise UserError(f"the disk of {path} is full; nothing was left there") from error
            raise
        finally:
            shutil.rmtree(draft, ignore_errors=True)
            scratch.unlink(missing_ok=True)
    return Exported(path, digest, False, written, time.perf_counter() - started)


def identical_tensors(a: ModelFiles, b: ModelFiles) -> int:
    """Number of tensors, all byte-identical; raises ValueError naming one that differs."""
    if set(a.tensors) != set(b.tensors):
        raise ValueError(f"tensors differ: {sorted(set(a.tensors) ^ set(b.tensors))[:5]}")
    for name, entry in a.tensors.items():
        other = b.tensors[name]
        same = entry.shape == other.shape and entry.dtype == other.dtype
        if not same or any(
            x != y for x, y in zip(tensor_bytes(a, name), tensor_bytes(b, name), strict=True)
        ):
            raise ValueError(f"tensor {name} of {b.path} is not that of {a.path}")
    return len(a.tensors)


def check_outside(target: Path, base: Path) -> None:
    """Raise UserError where an export would change its base: be it, or become a part of it."""
    if target.resolve() == base.resolve():
        raise UserError(f"export.path = {target} is the base checkpoint itself")
    if base.resolve() in target.resolve().parents:
        raise UserError(f"{target} is inside the base checkpoint: choose another export.path")


def check_target(target: Path, base: str) -> None:
    """Raise UserError if `target` exists and is no export of the base with this digest."""
    if not target.exists():
        return
    manifest = manifest_values(target)
    if not manifest:
        raise UserError(
            f"{target} exists and is not an export: choose another export.path or move it away"
        )
    made_from = manifest.get("base", {}).get("digest", "?")
    if made_from != base:
        raise UserError(
            f"{target} is an export of another base ({made_from[:8]}, this one is {base[:8]}): "
            "choose another export.path or move it away"
        )


def exported_digest(target: Path, key: str) -> str | None:
    """Digest of the finished export with this key at `target`, or None."""
    if manifest_values(target).get("key") != key:
        return None
    return read_manifest(target).digest


def _existing(target: Path, key: str) -> Exported:
    manifest = manifest_values(target)
    if manifest.get("key") != key:
        raise UserError(
            f"{target} exists and is not this export: choose another export.path or move it away"
        )
    if wrong := misfits(target):
        raise UserError(f"{wrong}: move {target} away and run again")
    return Exported(target, manifest["digest"], True, 0, 0.0)


def bytes_needed(source: ModelFiles, slices: Slices) -> int:
    """Disk space that an export takes, a little more than its files."""
    need = sum((source.path / name).stat().st_size for name in source.companions) + (16 << 20)
    return need + sum(sliced_bytes(source.tensors[name], part) for name, part in slices.items())


def _check_space(source: ModelFiles, slices: Slices, target: Path) -> None:
    need = bytes_needed(source, slices)
    free = shutil.disk_usage(target.parent).free
    if free < need:
        raise UserError(
            f"{target.parent} has {free / 1e9:.2f} GB free, the pruned checkpoint needs about "
            f"{need / 1e9:.2f} GB: free some, or set export.path / runtime.checkpoint_dir"
        )


def _write(
    family: Family,
    source: ModelFiles,
    slices: Slices,
    plan: KeepPlan,
    draft: Path,
    target: Target,
    on_bytes: Callable[[int], None],
) -> tuple[str, int]:
    layout = target.layout(plan)
    written = write_sliced(source, slices, draft, target.max_shard_bytes, on_bytes)
    hashes = dict(written.files)
    config = family.patch_config(source.config, len(layout.kept[0]))
    hashes["config.json"] = write_text(draft / "config.json", as_json(config))
    for name in source.companions:
        (draft / name).parent.mkdir(parents=True, exist_ok=True)
        hashes[name] = copy_file(source.path / name, draft / name)
    numbers = family.layer_numbers(source.config)
    mapping = {
        str(layer): {str(new): old for new, old in enumerate(ids)}
        for layer, ids in zip(numbers, layout.kept, strict=True)
    }
    texts = {MAPPING: as_json({"new_to_old": mapping}), **target.files_beside}
    records = {name: write_text(draft / name, text) for name, text in texts.items()}
    reopened = open_model(draft)  # what was written reads back as a checkpoint
    digest = model_digest(hashes)
    manifest = manifest_of(
        draft, target.key, digest, (plan, layout), target.provenance, hashes, records
    )
    write_text(draft / MANIFEST, as_json(manifest))
    assert set(reopened.tensors) == set(source.tensors), "the export lost a tensor"
    return digest, written.tensor_bytes
