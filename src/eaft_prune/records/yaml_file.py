"""Records as YAML whose numbers are read back to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import ValidationError

from eaft_prune.config import Settings
from eaft_prune.core.types import UserError

File = TypeVar("File", bound=Settings)


def to_yaml(head: str, file: Settings) -> str:
    """YAML text under a comment; numbers are written by repr."""
    values = file.model_dump(mode="json")
    text: str = yaml.safe_dump(
        values, sort_keys=False, allow_unicode=True, default_flow_style=None, width=100
    )
    return head + text


def read_yaml(path: Path, kind: type[File], key: str) -> File:
    try:
        return kind.model_validate(yaml.safe_load(path.read_text()))
    except OSError as error:
        raise UserError(f"{key} = {path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{key} = {path} is not YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{key} = {path} is no {key} file: {where} {first['msg']}") from None
