"""An exported checkpoint against its manifest and its base: every difference."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from eaft_prune.checkpoints.cut import cut
from eaft_prune.checkpoints.families.base import Family
from eaft_prune.checkpoints.pad import check_switches, padded, with_routers_off
from eaft_prune.checkpoints.projections import changeable
from eaft_prune.checkpoints.read import (
    INDEX,
    MANIFEST,
    MAPPING,
    SIGNATURE,
    ModelFiles,
    model_digest,
    open_model,
    read_json,
    tensor_bytes,
)
from eaft_prune.checkpoints.slice import Slice, sliced_shape
from eaft_prune.checkpoints.token_tables import with_tables
from eaft_prune.core.foreign import check_inside
from eaft_prune.core.text import shortened
from eaft_prune.core.types import KeepPlan, UserError
from eaft_prune.records.manifest import Manifest, strangers

_CHUNK = 16 << 20
_THREADS = min(8, os.cpu_count() or 1)
_FREE = {MANIFEST, SIGNATURE, "README.md"}  # cannot be listed; the card is there to be edited
_TEXT = "The sum of two and two is"

OnBytes = Callable[[int], None]


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be: in which file, and what."""

    file: str
    what: str
    tensor: str | None = None
    expert: int | None = None  # in the checkpoint
    base_expert: int | None = None


def work(manifest: Manifest) -> int:
    """Bytes that `check_files` and `check_base` report as they go, if nothing is missing."""
    sizes = {n: int(facts["bytes"]) for n, facts in {**manifest.files, **manifest.records}.items()}
    shards = [size for name, size in sizes.items() if name.endswith(".safetensors")]
    return sum(sizes.values()) + sum(shards)  # shards are hashed, then compared


def check_files(manifest: Manifest, on_bytes: OnBytes) -> list[Finding]:
    """Every file present, whole and expected: sizes and sha256 as the manifest has them."""
    listed = {**manifest.files, **manifest.records}
    wrong = {name: why for name in sorted(listed) if (why := _no_file(manifest.path, name))}
    present = sorted(set(listed) - set(wrong))
    found = [Finding(name, why) for name, why in wrong.items()]
    found += [
        Finding(name, "is not in the manifest")
        for name in strangers(manifest.path, {*listed, *_FREE})
    ]
    with ThreadPoolExecutor(_THREADS) as pool:
        hashes = pool.map(lambda name: _sha256(manifest.path / name, on_bytes), present)
        for name, sha in zip(present, hashes, strict=True):
            size, want = (manifest.path / name).stat().st_size, listed[name]
            if size != want["bytes"]:
                found.append(Finding(name, f"has {size} bytes, not {want['bytes']}"))
            elif sha != want["sha256"]:
                found.append(Finding(name, f"has sha256 {sha[:12]}, not {want['sha256'][:12]}"))
    if model_digest({name: facts["sha256"] for name, facts in manifest.files.items()}) != (
        manifest.digest
    ):
        found.append(Finding(MANIFEST, "its digest is not that of the files it lists"))
    return found


def check_base(
    family: Family,
    manifest: Manifest,
    base: ModelFiles,
    base_hashes: Mapping[str, str],
    on_bytes: OnBytes,
) -> list[Finding]:
    """Plan, mapping, config and companions follow from the base; kept bytes are the base's.

    A tensor that the manifest names as changed must be one that the compensation it names may
    change, and have the base's shape and type and the bytes whose sha256 the manifest gives.
    """
    path = manifest.path
    plan = padded(manifest.plan) if manifest.padded else manifest.plan
    if plan.uniform_keep_n is None:
        raise UserError(f"{path}: its plan keeps other numbers of experts in other layers")
    biases = check_switches(family, base) if manifest.padded else ()
    kept = cut(family, base, plan)
    base = kept.files
    found = []
    if manifest.plan.digest != manifest.plan_digest:
        found.append(Finding(MANIFEST, "the plan's digest is not that of its experts"))
    free = changeable(base.tensors, manifest.compensation)
    for name in sorted(set(manifest.changed_tensors) - free):
        what = f"{name} is listed as changed, which compensation={manifest.compensation} is not to"
        found.append(Finding(MANIFEST, what, name))
    filled = [sorted({*a} - {*b}) for a, b in zip(plan.kept, manifest.plan.kept, strict=True)]
    if list(map(list, manifest.padding)) != filled:
        found.append(Finding(MANIFEST, f"its padding is not {shortened(str(filled))}"))
    found += _check_mapping(plan, family.layer_numbers(base.config), path / MAPPING)
    found += _check_config(family.patch_config(base.config, plan.uniform_keep_n), path)
    for name in sorted(set(base.companions) | _companions(manifest)):
        ours = manifest.files.get(name, {}).get("sha256")
        if ours != base_hashes.get(name):
            found.append(Finding(name, "is not the base's"))
    try:
        model = open_model(path)
    except UserError as error:
        return [*found, Finding(INDEX, f"no tensor can be compared: {error}")]
    for name in sorted(set(base.tensors) - set(model.tensors)):
        found.append(Finding(INDEX, f"{name} is missing", name))
    for name in sorted(set(model.tensors) - set(base.tensors)):
        found.append(Finding(model.tensors[name].file, f"{name} is not in the base", name))
    both = [name for name in base.tensors if name in model.tensors]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(_THREADS) as pool:
        base = with_tables(base, kept.tables, plan, Path(folder) / "changed")
        if manifest.padded:
            base = with_routers_off(base, biases, manifest.plan, Path(folder) / "changed")
        compared = pool.map(
            lambda name: _check_tensor(
                model, base, name, kept.slices[name], manifest.changed_tensors.get(name), on_bytes
            ),
            both,
        )
        return [*found, *(_owned(item, kept.owners) for item in chain.from_iterable(compared))]


def _no_file(path: Path, name: str) -> str | None:
    """Why a name is not that of a file whose bytes lie in `path`, or None."""
    try:
        check_inside(path, name)
    except UserError as error:
        return "is missing" if not os.path.lexists(path / name) else str(error)
    return None


def _owned(finding: Finding, owners: Mapping[str, tuple[int, int]]) -> Finding:
    """The finding with the expert that its tensor holds, if it holds one."""
    if finding.tensor is None or finding.tensor not in owners:
        return finding
    new, old = owners[finding.tensor]
    what = f"{finding.what} (the base's expert {old})"
    return replace(finding, what=what, expert=new, base_expert=old)


def smoke_load(family: Family, path: Path) -> list[Finding]:
    """transformers loads model and tokenizer and runs a few tokens: all logits must be finite."""
    import torch
    from transformers import AutoTokenizer

    from eaft_prune.core.quiet import quiet

    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(
                path, local_files_only=True, trust_remote_code=False
            )
            # bfloat16 is what dequantised experts are stored in: half the memory of float32
            model = family.load(
                path,
                read_json(path / "config.json"),
                dtype=torch.bfloat16,
                # config.json may name kernels of the hub for either
                attn_implementation="eager",
                experts_implementation="eager",
            )
        ids = torch.tensor([tokenizer(_TEXT, add_special_tokens=False)["input_ids"]])
        with torch.inference_mode():
            logits = model.to("cpu").eval()(input_ids=ids, use_cache=False).logits
    # whatever a damaged checkpoint makes a library raise is what was to be found out
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        return [Finding("config.json", f"cannot be loaded: {type(error).__name__}: {first}")]
    if not torch.isfinite(logits).all():
        return [Finding(INDEX, "the model gives logits that are not finite")]
    return []


def _check_mapping(plan: KeepPlan, numbers: Sequence[int], path: Path) -> list[Finding]:
    wanted = {
        str(layer): {str(new): old for new, old in enumerate(ids)}
        for layer, ids in zip(numbers, plan.kept, strict=True)
    }
    try:
        mapping = read_json(path).get("new_to_old")
    except UserError as error:
        return [Finding(MAPPING, str(error))]
    if not isinstance(mapping, dict) or set(mapping) != set(wanted):
        return [Finding(MAPPING, f"does not map the layers {shortened(str([*numbers]))}")]
    return [
        Finding(
            MAPPING,
            f"layer {layer} is {shortened(json.dumps(mapping[layer]), 200)}, the plan's is {ids}",
        )
        for layer, ids in wanted.items()
        if mapping[layer] != ids
    ]


def _check_config(wanted: Mapping[str, Any], path: Path) -> list[Finding]:
    try:
        config = read_json(path / "config.json")
    except UserError as error:
        return [Finding("config.json", str(error))]
    absent = "absent"
    return [
        Finding(
            "config.json",
            f"{key} is {shortened(repr(config.get(key, absent)))}, "
            f"not {shortened(repr(wanted.get(key, absent)))}",
        )
        for key in sorted(set(wanted) | set(config))
        if config.get(key, absent) != wanted.get(key, absent)
    ]


def _companions(manifest: Manifest) -> set[str]:
    """Files of the model that are neither weights nor written by the export."""
    own = {"config.json", INDEX}
    return {n for n in manifest.files if n not in own and not n.endswith(".safetensors")}


def _check_tensor(
    model: ModelFiles,
    base: ModelFiles,
    name: str,
    part: Slice | None,
    changed: str | None,
    on_bytes: OnBytes,
) -> list[Finding]:
    ours, theirs = model.tensors[name], base.tensors[name]
    shape = sliced_shape(theirs, part)
    if (ours.dtype, ours.shape) != (theirs.dtype, shape):
        what = f"{name} is {ours.dtype} {list(ours.shape)}, not {theirs.dtype} {list(shape)}"
        return [Finding(ours.file, what, name)]
    if changed is not None:
        sha = hashlib.sha256()
        for chunk in tensor_bytes(model, name):
            sha.update(chunk)
            on_bytes(len(chunk))
        what = f"{name} has sha256 {sha.hexdigest()[:12]}, not {changed[:12]}"
        return [] if sha.hexdigest() == changed else [Finding(ours.file, what, name)]
    if part is None:
        at = _first_difference(tensor_bytes(model, name), tensor_bytes(base, name), on_bytes)
        what = f"{name} differs from byte {at} on"
        return [] if at is None else [Finding(ours.file, what, name)]
    found = []
    for new, old in enumerate(part.kept):
        mine = tensor_bytes(model, name, new, part.axis)
        other = tensor_bytes(base, name, old, part.axis)
        at = _first_difference(mine, other, on_bytes)
        if at is not None:
            what = f"{name}: expert {new} (the base's {old}) differs from byte {at} on"
            found.append(Finding(ours.file, what, name, new, old))
    return found


def _first_difference(
    ours: Iterator[bytes], theirs: Iterator[bytes], on_bytes: OnBytes
) -> int | None:
    """Offset of the first byte that differs, None if none does; both are equally long."""
    offset, first = 0, None
    for mine, other in zip(ours, theirs, strict=True):
        if first is None and mine != other:
            differs = np.frombuffer(mine, np.uint8) != np.frombuffer(other, np.uint8)
            first = offset + int(np.argmax(differs))
        offset += len(mine)
        on_bytes(len(mine))
    return first


def _sha256(path: Path, on_bytes: OnBytes) -> str:
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            sha.update(chunk)
            on_bytes(len(chunk))
    return sha.hexdigest()
