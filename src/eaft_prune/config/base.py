"""What all sections of the settings are made of."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from eaft_prune.core.types import UserError

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Limit = Annotated[float, Field(ge=0)]
BlockCount = Positive | Literal["all"]  # all: as many as the rows give
_MOST_LETTERS = 100


def _name(name: str) -> str:
    if not re.fullmatch(r"\w[\w .-]*", name) or len(name) > _MOST_LETTERS:
        raise ValueError(
            "a name may become a directory's: letters, digits, _ and, not first, - . and spaces; "
            f"at most {_MOST_LETTERS} of them"
        )
    return name


Name = Annotated[str, AfterValidator(_name)]
SeqLen = Annotated[int, Field(ge=2)]


class Settings(BaseModel):
    """A section: the one place of its defaults and, below each setting, of what it means."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        protected_namespaces=(),
        defer_build=True,  # a tenth of a second that an unknown setting need not wait for
    )


def nearest(name: str, known: Sequence[str]) -> str | None:
    """The known name most like a mistyped one, or None."""
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return matches[0] if matches else None


def allowed(name: str, known: Sequence[str]) -> str:
    """What may stand where `name` stands, the likeliest first."""
    close = nearest(name, known)
    hint = f"did you mean {close!r}? " if close else ""
    return f"{hint}allowed: {', '.join(known)}"


def resolve_path(path: str, base: Path | None = None) -> Path:
    """Absolute path of a user's path, `~` expanded, relative to `base` or the working directory."""
    try:
        return (base or Path.cwd()).joinpath(Path(path).expanduser()).resolve()
    except (RuntimeError, ValueError) as error:  # ~nobody, a loop of links, a zero
        raise UserError(f"{path!r} is no path: {error}") from None
