"""Is everything in order? Each check looks at one thing and names what is wrong with its mend."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

from filelock import FileLock, Timeout
from packaging.requirements import Requirement

from eaft_prune.checkpoints.cut import cut
from eaft_prune.checkpoints.families import family_of
from eaft_prune.checkpoints.read import MANIFEST, ModelFiles, open_model
from eaft_prune.checkpoints.size import parameters
from eaft_prune.config import Experiment, resolve_path
from eaft_prune.core.diagnosis import Diagnosis
from eaft_prune.core.progress import Bars
from eaft_prune.core.provenance import installed
from eaft_prune.core.store import Store, damage, lock_of
from eaft_prune.core.types import KeepPlan, UserError
from eaft_prune.packs import sources
from eaft_prune.packs.pack_file import PackFile
from eaft_prune.packs.rows import check_column, count_rows
from eaft_prune.records.manifest import misfits
from eaft_prune.stages.export import bytes_needed

TRASH = ".trash"
_PACKAGE = "eaft_prune"


def safely(name: str, check: Callable[[], Iterable[Diagnosis]]) -> list[Diagnosis]:
    """A check's findings; where it breaks, that is the finding: the doctor outlives the patient."""
    try:
        return list(check())
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        return [Diagnosis(name, False, f"cannot be checked: {type(error).__name__}: {first}")]


def check_packages() -> Iterable[Diagnosis]:
    """Installed versions against what the package asks for."""
    wrong = 0
    try:
        wanted = [Requirement(line) for line in requires(_PACKAGE) or ()]
    except PackageNotFoundError:
        yield Diagnosis("packages", False, f"{_PACKAGE} is not installed", "pip install -e .")
        return
    plain = [r for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})]
    for requirement in plain:
        found = installed(requirement.name)
        if found == "not installed" or not requirement.specifier.contains(found, prereleases=True):
            wrong += 1
            what = f"{requirement.name} is {found}, wanted {requirement.specifier}"
            yield Diagnosis("packages", False, what, f"pip install {shlex.quote(str(requirement))}")
    if not wrong:
        yield Diagnosis("packages", True, f"{len(plain)} requirements hold")


def check_store(root: Path, bars: Bars, mend: bool) -> Iterable[Diagnosis]:
    """Every output against its digests; drafts of dead runs; locks."""
    if not root.exists():
        yield Diagnosis("store", True, f"{root} is empty: the first run makes it")
        return
    if not os.access(root, os.R_OK | os.W_OK | os.X_OK):
        yield Diagnosis("store", False, f"{root} cannot be written", f"chmod u+rwx {_quoted(root)}")
        return
    store = Store(root)
    outputs = store.outputs()
    broken = 0
    with bars.bar("check store", len(outputs), "output") as on_outputs:
        for home in outputs:
            wrong = damage(home)
            on_outputs(1)
            if wrong is not None and _free(lock_of(home)):
                broken += 1
                yield Diagnosis(
                    "store", False, f"{home} is damaged: {wrong}", f"rm -r {_quoted(home)}"
                )
    for draft in store.drafts():
        yield from _draft("store", draft, lock_of(draft.with_suffix("")), mend)
    yield from _trash("store", root, mend)
    held = [lock for path in sorted(root.glob("[!.]*/*.lock")) if (lock := _holder(path))]
    in_use = f", {len(held)} in use ({', '.join(sorted(set(held)))})" if held else ", none in use"
    yield Diagnosis(
        "store", True, f"{len(outputs) - broken} of {len(outputs)} outputs whole{in_use}"
    )


def check_checkpoints(directory: Path, mend: bool) -> Iterable[Diagnosis]:
    """Exports against the sizes in their manifests; drafts of dead exports."""
    good = 0
    for manifest in sorted(directory.glob(f"[!.]*/{MANIFEST}")):
        export = manifest.parent
        wrong = misfits(export)
        good += not wrong
        if wrong:
            aside = export.with_name(export.name + ".damaged")
            mending = f"mv {_quoted(export)} {_quoted(aside)}"
            yield Diagnosis("checkpoints", False, f"{export} is damaged: {wrong}", mending)
    for draft in sorted(directory.glob(".*.draft")):
        lock = FileLock(draft.with_suffix(".lock"))
        yield from _draft("checkpoints", draft, lock, mend)
    yield from _trash("checkpoints", directory, mend)
    yield Diagnosis("checkpoints", True, f"{good} exports as their manifests say, by size")


def check_model(experiment: Experiment) -> Iterable[Diagnosis]:
    """The configured checkpoint is here and has its family's tensors; else, whether it can be."""
    settings = experiment.model
    command = _predownload(f"model={settings.name}")
    try:
        files = local_model(experiment)
        family_of(files.config).table(files)
    except UserError as error:
        yield Diagnosis("model", False, str(error), command if settings.hub_id else "")
    else:
        size = f"{len(files.tensors)} tensors, {files.weight_bytes / 1e9:.2f} GB"
        yield Diagnosis("model", True, f"{settings.name} at {files.path}: {size}")
        return
    if settings.hub_id:
        yield from _hub(settings.hub_id, settings.revision)


def check_packs(experiment: Experiment) -> Iterable[Diagnosis]:
    """Every pack is here and has rows of text or messages."""
    for name, source in experiment.packs.files.items():
        command = _predownload(f"packs={experiment.packs.name}")
        try:
            path = sources.pack_file(name, source, experiment.packs.revision, local_only=True)
            file = PackFile(name, path, experiment.packs.text_column)
            check_column(file)
            rows = count_rows(file)
        except UserError as error:
            yield Diagnosis("packs", False, str(error), command if "://" in source else "")
        else:
            yield Diagnosis("packs", True, f"{name}: {rows:,} rows")


def check_disk(experiment: Experiment) -> Iterable[Diagnosis]:
    """Room for the checkpoint that is planned."""
    try:
        files = local_model(experiment)
    except UserError:
        return  # check_model tells
    family = family_of(files.config)
    n_experts, n_layers = family.n_experts(files.config), family.n_layers(files.config)
    keep_n = min(experiment.pruning.keep_n, n_experts)
    plan = KeepPlan((tuple(range(keep_n)),) * n_layers, n_experts)
    kept = cut(family, files, plan)
    need = bytes_needed(kept.files, kept.slices)
    path = resolve_path(experiment.export.path or experiment.runtime.checkpoint_dir)
    free = shutil.disk_usage(_existing(path)).free
    what = f"{path} has {free / 1e9:.2f} GB free, keep_n = {keep_n} takes {need / 1e9:.2f} GB"
    folders = [
        f"runtime.{name}={resolve_path(getattr(experiment.runtime, name))}"
        for name in ("store_dir", "checkpoint_dir")
    ]
    mending = shlex.join(["python", "-m", "eaft_prune", "task=gc", "gc.delete=true", *folders])
    yield Diagnosis("disk", free >= need, what, "" if free >= need else mending)


def check_device(experiment: Experiment) -> Iterable[Diagnosis]:
    """A device for the model, and memory for its weights as they are held there."""
    import psutil
    import torch

    from eaft_prune.engines.packed_model import is_packed, weigh

    asked = experiment.runtime.device
    cuda = torch.cuda.is_available()
    if asked.startswith("cuda") and not cuda:
        what = f"runtime.device = {asked}, and torch {torch.__version__} sees no CUDA device"
        yield Diagnosis("device", False, what, "nvidia-smi; or set runtime.device=cpu")
        return
    on_cuda = cuda and asked != "cpu"
    if on_cuda:
        which = torch.device("cuda" if asked == "auto" else asked)
        properties = torch.cuda.get_device_properties(which)
        name, memory = properties.name, properties.total_memory
    else:
        name, memory = "CPU", psutil.virtual_memory().available
    try:
        files = local_model(experiment)
    except UserError:
        yield Diagnosis("device", True, f"{name}, {memory / 1e9:.1f} GB")
        return
    dtype = experiment.runtime.dtype
    width = 4 if dtype == "float32" or (dtype == "auto" and not on_cuda) else 2
    if on_cuda and is_packed(files):
        sizes = weigh(files, torch.bfloat16, experiment.runtime.batch_tokens or 8192)
        need = sizes.on_one(2)  # two layers' experts in turn, the others wait in host memory
        what = f"{name}, {memory / 1e9:.1f} GB; the model takes {need / 1e9:.2f} GB at the least"
    else:
        need = parameters(files) * width
        what = f"{name}, {memory / 1e9:.1f} GB; the dequantised weights take {need / 1e9:.2f} GB"
    fits = need < memory
    yield Diagnosis("device", fits, what, "" if fits else "use a device with more memory")


def local_model(experiment: Experiment) -> ModelFiles:
    """The configured checkpoint's headers, without asking a hub; raises UserError."""
    return open_model(sources.model_path(experiment.model, local_only=True))


def _hub(hub_id: str, revision: str | None) -> Iterable[Diagnosis]:
    """Whether the hub answers, and whether its files would fit."""
    from huggingface_hub import HfApi, constants

    try:
        info = HfApi().model_info(hub_id, revision=revision, timeout=5, files_metadata=True)
    except Exception as error:  # the hub client raises a dozen unrelated types
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        what = f"{hub_id} cannot be reached: {first}"
        yield Diagnosis("hub", False, what, "download it elsewhere; model=local model.path=DIR")
        return
    wanted = [s for s in info.siblings or () if not s.rfilename.startswith(sources.NOT_FETCHED)]
    need = sum(s.size or 0 for s in wanted)
    cache = Path(constants.HF_HUB_CACHE)
    free = shutil.disk_usage(_existing(cache)).free
    what = f"{hub_id}: {need / 1e9:.2f} GB to download, {cache} has {free / 1e9:.2f} GB free"
    yield Diagnosis("hub", free > need, what, "" if free > need else "export HF_HOME=DIR")


def _draft(check: str, draft: Path, lock: FileLock, mend: bool) -> Iterable[Diagnosis]:
    """A draft under a lock that nobody holds is a dead run's."""
    try:
        with lock.acquire(timeout=0):
            if not draft.exists():
                return
            if mend:
                shutil.rmtree(draft)
            what = f"{draft} was left by a dead run"
            yield Diagnosis(check, False, what, f"rm -r {_quoted(draft)}", mended=mend)
    except Timeout:
        yield Diagnosis(check, True, f"{draft} is being written")


def _trash(check: str, directory: Path, mend: bool) -> Iterable[Diagnosis]:
    trash = directory / TRASH
    if not trash.exists():
        return
    if mend:
        shutil.rmtree(trash)
    what = f"{trash} was left by a task=gc that was stopped"
    yield Diagnosis(check, False, what, f"rm -r {_quoted(trash)}", mended=mend)


def _free(lock: FileLock) -> bool:
    try:
        with lock.acquire(timeout=0):
            return True
    except Timeout:
        return False


def _holder(path: Path) -> str | None:
    """Who holds a lock file, or None. The kernel drops a dead process's locks by itself."""
    if _free(FileLock(path)):
        return None
    inode = str(path.stat().st_ino)
    table = Path("/proc/locks")
    for line in table.read_text().splitlines() if table.exists() else ():
        fields = line.split()
        if len(fields) > 5 and fields[5].split(":")[-1] == inode:
            return f"process {fields[4]}"
    return "a process"


def _existing(path: Path) -> Path:
    """The path, or its nearest parent that is there."""
    return next(place for place in (path, *path.parents) if place.exists())


def _predownload(setting: str) -> str:
    return shlex.join(["python", "-m", "eaft_prune", "task=predownload", setting])


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
