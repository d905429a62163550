"""Base checkpoint + keep plan -> a smaller checkpoint directory, whole or not at all."""

from __future__ import annotations

import errno
import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from filelock import FileLock

from eaft_prune import __version__
from eaft_prune.checkpoints.families.base import Family, renumbered, slices_of
from eaft_prune.checkpoints.pad import muted, padded
from eaft_prune.checkpoints.read import (
    MANIFEST,
    MAPPING,
    ModelFiles,
    TensorEntry,
    model_digest,
    open_model,
    read_json,
    tensor_bytes,
)
from eaft_prune.checkpoints.slice import Slices, copy_file, write_sliced, write_text
from eaft_prune.core.files import sync
from eaft_prune.core.types import KeepPlan, UserError

VERSION = 2
_NOTHING: Mapping[str, str] = MappingProxyType({})
_UNCHANGED: Mapping[str, TensorEntry] = MappingProxyType({})


@dataclass(frozen=True)
class Exported:
    """A written checkpoint: where, its digest, and whether it was there already."""

    path: Path
    digest: str
    cached: bool
    bytes_written: int
    seconds: float


def export(
    family: Family,
    source: ModelFiles,
    plan: KeepPlan,
    target: Path,
    key: str,
    max_shard_bytes: int,
    provenance: Mapping[str, Any],
    on_bytes: Callable[[int], None],
    extra_files: Mapping[str, str] = _NOTHING,
    pad_ragged: bool = False,
    changed: Mapping[str, TensorEntry] = _UNCHANGED,
) -> Exported:
    """Write `source` with only the plan's experts to `target`; expert bytes are copied, not redone.

    `extra_files` (name -> text) say how it was made: the manifest lists their hashes, the digest
    leaves them out. With pad_ragged the layers of a ragged plan are filled up to the largest with
    dropped experts whose router bias is -inf. `changed` says where the bytes of tensors lie that
    are not the source's: of all experts written. A finished export with the same key is used again.
    Raises UserError where `target` holds anything else, the plan is ragged otherwise, or the disk
    is full; the source is only read.
    """
    layout = padded(plan) if pad_ragged else plan
    if layout.uniform_keep_n is None:
        counts = sorted({len(ids) for ids in plan.kept})
        raise UserError(
            f"the plan keeps {counts} experts in different layers; a {family.model_type} "
            "checkpoint holds one number for all layers: evaluate it with eval.candidates=[masked]"
            + (", or fill the layers up with export.pad_ragged=true" if family.router_bias else "")
        )
    if target.resolve() == source.path.resolve():
        raise UserError(f"export.path = {target} is the base checkpoint itself")
    started = time.perf_counter()
    source = renumbered(family, source, layout)
    slices = {**slices_of(family, source, layout), **dict.fromkeys(changed)}
    source = replace(source, tensors={**source.tensors, **changed})
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{target.name}.draft")
    scratch = target.with_name(f".{target.name}.router")
    with FileLock(target.with_name(f".{target.name}.lock")):
        if target.exists():
            return _existing(target, key)
        shutil.rmtree(draft, ignore_errors=True)  # the lock is held: it is a dead run's
        scratch.unlink(missing_ok=True)
        _check_space(source, slices, target)
        draft.mkdir()
        try:
            tensors = source if layout == plan else muted(family, source, plan, scratch)
            digest, written = _write(
                family,
                tensors,
                slices,
                plan,
                layout,
                draft,
                key,
                max_shard_bytes,
                provenance,
                on_bytes,
                extra_files,
            )
            draft.rename(target)
            sync(target.parent)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise UserError(f"the disk of {target} is full; nothing was left there") from error
            raise
        finally:
            shutil.rmtree(draft, ignore_errors=True)
            scratch.unlink(missing_ok=True)
    return Exported(target, digest, False, written, time.perf_counter() - started)


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


def check_target(target: Path) -> None:
    """Raise UserError if `target` exists and is no export: before any work is done for it."""
    if target.exists() and not _manifest(target):
        raise UserError(
            f"{target} exists and is not an export: choose another export.path or move it away"
        )


def exported_digest(target: Path, key: str) -> str | None:
    """Digest of the finished export with this key at `target`, or None."""
    manifest = _manifest(target)
    return manifest["digest"] if manifest.get("key") == key else None


def _manifest(target: Path) -> dict[str, Any]:
    path = target / MANIFEST
    return read_json(path) if path.exists() else {}


def _existing(target: Path, key: str) -> Exported:
    manifest = _manifest(target)
    if manifest.get("key") != key:
        raise UserError(
            f"{target} exists and is not this export: choose another export.path or move it away"
        )
    if wrong := misfits(target):
        raise UserError(f"{wrong}: move {target} away and run again")
    return Exported(target, manifest["digest"], True, 0, 0.0)


def misfits(target: Path) -> str | None:
    """What of an export is not as its manifest says, by size, or None."""
    try:
        for name, facts in _manifest(target)["files"].items():
            path = target / name
            if not path.exists() or path.stat().st_size != facts["bytes"]:
                return f"{path} is not as its manifest says"
    except (UserError, LookupError, TypeError, AttributeError) as error:
        return f"{target / MANIFEST} is not a manifest: {error}"
    return None


def bytes_needed(source: ModelFiles, slices: Slices) -> int:
    """Disk space that an export takes, a little more than its files."""
    need = sum((source.path / name).stat().st_size for name in source.companions) + (16 << 20)
    for name, kept in slices.items():
        entry = source.tensors[name]
        need += entry.nbytes if kept is None else entry.nbytes // entry.shape[0] * len(kept)
    return need


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
    layout: KeepPlan,
    draft: Path,
    key: str,
    max_shard_bytes: int,
    provenance: Mapping[str, Any],
    on_bytes: Callable[[int], None],
    extra_files: Mapping[str, str],
) -> tuple[str, int]:
    written = write_sliced(source, slices, draft, max_shard_bytes, on_bytes)
    hashes = dict(written.files)
    config = family.patch_config(source.config, len(layout.kept[0]))
    hashes["config.json"] = write_text(draft / "config.json", _json(config))
    for name in source.companions:
        hashes[name] = copy_file(source.path / name, draft / name)
    mapping = {
        str(layer): {str(new): old for new, old in enumerate(ids)}
        for layer, ids in enumerate(layout.kept)
    }
    texts = {MAPPING: _json({"new_to_old": mapping}), **extra_files}
    records = {name: write_text(draft / name, text) for name, text in texts.items()}
    write_text(draft / "README.md", _card(plan, layout, provenance))
    reopened = open_model(draft)  # what was written reads back as a checkpoint
    digest = model_digest(hashes)
    manifest = {
        "format": 1,
        "key": key,
        "digest": digest,
        "eaft_prune": __version__,
        **provenance,
        "plan": {"kept": plan.kept, "n_experts": plan.n_experts, "digest": plan.digest},
        "padding": [
            sorted({*ids} - {*kept}) for ids, kept in zip(layout.kept, plan.kept, strict=True)
        ],
        "files": _sizes(draft, hashes),
        "records": _sizes(draft, records),
    }
    write_text(draft / MANIFEST, _json(manifest))
    assert set(reopened.tensors) == set(source.tensors), "the export lost a tensor"
    return digest, written.tensor_bytes


def _sizes(draft: Path, hashes: Mapping[str, str]) -> dict[str, Any]:
    return {
        name: {"sha256": sha, "bytes": (draft / name).stat().st_size}
        for name, sha in sorted(hashes.items())
    }


def _json(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"


def _card(plan: KeepPlan, layout: KeepPlan, provenance: Mapping[str, Any]) -> str:
    base, changed, padding = provenance["base"], "", ""
    if "changed_tensors" in provenance:
        changed = (
            f", but for the projections that `{MANIFEST}` lists as `changed_tensors`: least "
            "squares moved them to make up for the dropped experts"
        )
    if layout != plan:
        padding = (
            f"\nLayers are filled up to {layout.size} experts with dropped ones whose router bias "
            f"is -inf, so that no token is routed to them; `{MANIFEST}` lists them as `padding`.\n"
        )
    return f"""# {base["label"]}, {plan.size} of {plan.n_experts} experts a layer

Made by eaft_prune {__version__} from a checkpoint with digest `{base["digest"]}`. The kept experts'
bytes are those of the base{changed}; router rows were sliced with them; nothing was trained and
`num_experts_per_tok` is unchanged. `{MAPPING}` maps new expert ids to the base's,
`{MANIFEST}` lists the plan, the settings that made it and the sha256 of every file;
`python -m eaft_prune task=verify verify.path=DIR verify.base=DIR` checks all of that.
{padding}"""
