"""Objects of the user's own modules, named in settings as module:name."""

from __future__ import annotations

import importlib
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

from eaft_prune.core.digests import file_digest
from eaft_prune.core.types import UserError


def load_object(setting: str, where: str) -> Any:
    """The object that `module:name` says, looked for in the working directory too.

    Raises UserError naming the setting where there is no such module or name.
    """
    module_name, _, name = where.partition(":")
    if not module_name or not name:
        raise UserError(f"{setting} = {where!r} is not of the form module:name")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever a user's module raises when it is imported
        raise UserError(
            f"{setting} = {where!r}: module {module_name} cannot be imported from here: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not hasattr(module, name):
        names = [key for key in vars(module) if not key.startswith("_")]
        raise UserError(f"{setting} = {where!r}: {module_name} has no {name}, but {names}")
    return getattr(module, name)


@cache  # what was imported stays imported, whatever becomes of its file
def source_digest(setting: str, where: str) -> str:
    """sha256 of the file that an object's module lies in; raises UserError where there is none."""
    load_object(setting, where)
    file = getattr(sys.modules[where.partition(":")[0]], "__file__", None)
    if file is None:
        raise UserError(f"{setting} = {where!r}: its module has no source file to tell changes by")
    return file_digest(Path(file))
