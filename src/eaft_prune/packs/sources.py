"""Where checkpoints and packs come from: directories, the shipped demo, a hub."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

from eaft_prune.config import ModelSettings, PacksSettings, resolve_path
from eaft_prune.core.types import UserError
from eaft_prune.packs.pack_file import PackFile
from eaft_prune.packs.rows import check_column

_DEMO = "demo:"
_HUB_DATASET = "hf://datasets/"
# other formats of the same weights: what their names begin with
NOT_FETCHED = ("original/", "metal/", "consolidated")


def model_path(
    settings: ModelSettings,
    local_only: bool = False,
    check: Callable[[Path], None] = lambda config: None,
) -> Path:
    """The checkpoint directory, downloaded at its pinned revision if it has a hub id.

    local_only: ask no hub; raises UserError where it was not downloaded before. check: is given
    config.json before anything else is downloaded.
    """
    if settings.path is not None:
        return _local(settings.path)
    from huggingface_hub import hf_hub_download, snapshot_download, try_to_load_from_cache

    hub_id, revision = settings.hub_id or "", settings.revision
    try:
        if not local_only:
            cached = try_to_load_from_cache(hub_id, "config.json", revision=revision)
            if not isinstance(cached, str):  # None, or a mark that the hub has none
                cached = hf_hub_download(hub_id, "config.json", revision=revision)
            check(Path(cached))
        return Path(
            snapshot_download(
                hub_id,
                revision=revision,
                ignore_patterns=[f"{start}*" for start in NOT_FETCHED],
                local_files_only=local_only,
            )
        )
    except UserError as error:
        raise UserError(f"model.hub_id = {settings.hub_id!r}: {error}") from None
    except Exception as error:  # the hub client raises a dozen unrelated types
        raise UserError(
            f"model.hub_id = {settings.hub_id!r} (revision {settings.revision}) cannot be fetched: "
            f"{_first_line(error)}; download it elsewhere and use model=local model.path=DIR"
        ) from error


def pack_files(settings: PacksSettings) -> dict[str, Path]:
    """Path of every pack, in order; hub files are downloaded at `packs.revision`."""
    paths = {}
    for name, source in settings.files.items():
        paths[name] = pack_file(name, source, settings.revision)
    return paths


def pack_file(name: str, source: str, revision: str | None, local_only: bool = False) -> Path:
    """Path of one pack; local_only as in `model_path`."""
    if source.startswith(_HUB_DATASET):
        path = _hub_file(name, source, revision, local_only)
    else:
        path = _local(source)
    where = f"packs.files.{name} = {source}: {path}"
    if path.is_fifo():
        raise UserError(f"{where} is a pipe; packs are read more than once: write it to a file")
    if not path.is_file():
        raise UserError(f"{where} is not a file")
    if not os.access(path, os.R_OK):
        raise UserError(f"{where} may not be read by this user")
    return path


def check_there(model: ModelSettings | None, packs: PacksSettings | None) -> None:
    """Raise UserError where a directory or file of this machine cannot be read; asks no hub."""
    if model is not None and model.path is not None:
        path = _local(model.path)
        if not path.is_dir():
            raise UserError(
                f"model.path = {model.path}: {path} is not a directory: give a checkpoint directory"
            )
        if not os.access(path, os.R_OK | os.X_OK):
            raise UserError(f"model.path = {model.path}: {path} may not be read by this user")
    if packs is not None:
        here = {k: v for k, v in packs.files.items() if not v.startswith(_HUB_DATASET)}
        for name, source in here.items():
            path = pack_file(name, source, packs.revision)
            check_column(PackFile(name, path, packs.text_column))


def _local(path: str) -> Path:
    if path.startswith(_DEMO):
        return Path(str(files("eaft_prune") / "demo")) / path.removeprefix(_DEMO)
    return resolve_path(path)


def _hub_file(name: str, source: str, revision: str | None, local_only: bool) -> Path:
    from huggingface_hub import hf_hub_download

    parts = source.removeprefix(_HUB_DATASET).split("/", 2)
    if len(parts) != 3:
        raise UserError(f"packs.files.{name} = {source}: expected {_HUB_DATASET}OWNER/NAME/FILE")
    owner, repository, filename = parts
    try:
        return Path(
            hf_hub_download(
                f"{owner}/{repository}",
                filename,
                repo_type="dataset",
                revision=revision,
                local_files_only=local_only,
            )
        )
    except Exception as error:  # the hub client raises a dozen unrelated types
        raise UserError(
            f"packs.files.{name} = {source} (revision {revision}) cannot be fetched: "
            f"{_first_line(error)}; download it elsewhere and use packs=local"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
