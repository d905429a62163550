"""Where checkpoints and packs come from: directories, the shipped demo, a hub."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

from eaft_prune.config import ModelSettings, PacksSettings, resolve_path
from eaft_prune.core.types import UserError

_DEMO = "demo:"
_HUB_DATASET = "hf://datasets/"
# other formats of the same weights: what their names begin with
NOT_FETCHED = ("original/", "metal/", "consolidated")


def model_path(settings: ModelSettings, local_only: bool = False) -> Path:
    """The checkpoint directory, downloaded at its pinned revision if it has a hub id.

    local_only: ask no hub; raises UserError where it was not downloaded before.
    """
    if settings.path is not None:
        return _local(settings.path)
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                settings.hub_id or "",
                revision=settings.revision,
                ignore_patterns=[f"{start}*" for start in NOT_FETCHED],
                local_files_only=local_only,
            )
        )
    except Exception as error:  # the hub client raises a dozen unrelated types
        raise UserError(
            f"model.hub_id = {settings.hub_id!r} (revision {settings.revision}) cannot be fetched: "
            f"{_first_line(error)}; download it elsewhere and use model=local model.path=DIR"
        ) from error


def pack_files(settings: PacksSettings) -> dict[str, Path]:
    """Parquet path of every pack, in order; hub files are downloaded at `packs.revision`."""
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
    if not path.is_file():
        raise UserError(f"packs.files.{name} = {source}: {path} is not a file")
    return path


def count_rows(name: str, path: Path) -> int:
    """Number of rows, from the file's footer; raises UserError where it is not a parquet file."""
    import pyarrow
    import pyarrow.parquet

    try:
        rows = int(pyarrow.parquet.read_metadata(path).num_rows)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(
            f"pack {name}: {path} is not a parquet file: {_first_line(error)}"
        ) from None
    if rows == 0:
        raise UserError(f"pack {name}: {path} has no rows")
    return rows


def read_texts(name: str, path: Path, column: str) -> Iterator[str]:
    """The rows' texts in file order, streamed; raises UserError where the column is not text."""
    import pyarrow.parquet
    from datasets import load_dataset

    columns = pyarrow.parquet.read_schema(path).names
    if column not in columns:
        raise UserError(
            f"pack {name}: {path} has no column {column!r} (packs.text_column); it has "
            f"{', '.join(columns)}"
        )
    stream = load_dataset("parquet", data_files=[str(path)], split="train", streaming=True)
    for index, row in enumerate(stream.select_columns([column])):
        text = row[column]
        if not isinstance(text, str):
            raise UserError(f"pack {name}: row {index} of {path} holds {text!r}, not text")
        yield text


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
