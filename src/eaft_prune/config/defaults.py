"""The settings' own defaults as plain values: what the command line composes options over."""

from __future__ import annotations

from collections.abc import Iterator
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic_core import to_jsonable_python

from eaft_prune.config.base import Settings
from eaft_prune.config.experiment import Experiment

MISSING = "???"  # OmegaConf's word for a value that must be given


def section_of(annotation: Any) -> type[Settings] | None:
    """The section that an annotation `Section` or `Section | None` stands for, else None."""
    kinds = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    for kind in kinds:
        if isinstance(kind, type) and issubclass(kind, Settings):
            return kind
    return None


def defaults(section: type[Settings]) -> dict[str, Any]:
    """Setting -> default, in the order of the fields; `???` where there is none."""
    found: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        inner = section_of(field.annotation)
        if not field.is_required():
            found[name] = to_jsonable_python(field.get_default(call_default_factory=True))
        else:
            found[name] = defaults(inner) if inner else MISSING
    return found


def nodes() -> Iterator[tuple[str, dict[str, Any]]]:
    """What options are composed over: `settings`, and a node of its own for a task's section.

    A task's section is one that is absent unless its task is chosen.
    """
    found = defaults(Experiment)
    own = {
        name: kind
        for name, field in Experiment.model_fields.items()
        if found[name] is None and (kind := section_of(field.annotation))
    }
    yield "settings", {name: value for name, value in found.items() if name not in own}
    for name, kind in own.items():
        yield name, {name: defaults(kind)}
