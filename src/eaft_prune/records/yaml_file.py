"""Records as YAML whose numbers are read back to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from eaft_prune.config import Settings
from eaft_prune.core.foreign import check_regular
from eaft_prune.core.text import shortened, yaml_text
from eaft_prune.core.types import UserError

File = TypeVar("File", bound=Settings)
_MOST = 64_000_000  # bytes


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # yaml has no types
    """Plain values, no aliases: nothing of ours writes them, and nested they fill any memory."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.MarkedYAMLError(
                problem="aliases are not read", problem_mark=event.start_mark
            )
        return super().compose_node(parent, index)


def to_yaml(head: str, file: Settings) -> str:
    """YAML text under a comment; numbers are written by repr."""
    values = file.model_dump(mode="json")
    return head + yaml_text(values, default_flow_style=None, width=100)


def load_yaml(path: Path, key: str) -> Any:
    """The values in a file that `key` names; raises UserError where it cannot be read."""
    try:
        if check_regular(path) > _MOST:
            raise UserError(f"{path} is larger than {_MOST:,} bytes")
        return yaml.load(path.read_text(), Loader=_Loader)
    except UserError as error:
        raise UserError(f"{key} = {path} cannot be read: {error}") from None
    except OSError as error:
        raise UserError(f"{key} = {path} cannot be read: {error.strerror}") from None
    except RecursionError:
        raise UserError(f"{key} = {path} is not YAML that can be read: nested too deep") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a number of thousands of digits
        why = shortened(" ".join(str(error).split()), 300)
        raise UserError(f"{key} = {path} is not YAML: {why}") from None


def read_yaml(path: Path, kind: type[File], key: str) -> File:
    try:
        return kind.model_validate(load_yaml(path, key))
    except ValidationError as error:
        first = error.errors()[0]
        where = shortened(".".join(map(str, first["loc"])))
        raise UserError(f"{key} = {path} is no {key} file: {where} {first['msg']}") from None
