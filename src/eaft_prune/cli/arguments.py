"""What was typed: our flags, apart from the overrides that Hydra composes."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from eaft_prune.cli.grammar import written
from eaft_prune.config import nearest, resolve_path, runs_code
from eaft_prune.core.types import UserError
from eaft_prune.records.recipe import read_recipe

MULTIRUN = ("-m", "--multirun")
_HELP, _VERSION = ("-h", "--help"), ("--version",)
_PLACES = ("-cd", "--config-dir")
_ALREADY = ("-r", "--run")  # what happens anyway
# Hydra's own that print and run nothing; those that take a value say what it is
COMPLETION = frozenset(("-sc", "--shell-completion"))
_SHOWN_ALONE = ("--hydra-help", "--resolve", *COMPLETION)
_SHOWN = ("-c", "--cfg", "-p", "--package", "-i", "--info")
_ELSEWHERE = {
    "-cp": "--config-dir=DIR adds a directory of your own options",
    "--config-path": "--config-dir=DIR adds a directory of your own options",
    "-cn": "experiment=NAME selects a file of your own",
    "--config-name": "experiment=NAME selects a file of your own",
    "--experimental-rerun": "task=replay replay.lock=FILE runs a run again",
}
_KNOWN = (*MULTIRUN, *_HELP, *_VERSION, *_PLACES, *_ALREADY, *_SHOWN_ALONE, *_SHOWN, *_ELSEWHERE)


@dataclass(frozen=True)
class Arguments:
    """Overrides with recipes written out, and the flags beside them."""

    overrides: tuple[str, ...]
    multirun: bool = False
    places: tuple[Path, ...] = ()  # directories of the user's own options
    shown: tuple[str, ...] = ()  # Hydra's flags that print and run nothing
    help: bool = False
    version: bool = False
    typed: str = ""  # all of it, as a shell takes it


def parse(argv: Sequence[str]) -> Arguments:
    """Sort a command line; raises UserError at a flag that does not exist."""
    overrides: list[str] = []
    places: list[Path] = []
    shown: list[str] = []
    seen: set[str] = set()
    rest = iter(argv)
    for argument in rest:
        flag, has_value, value = argument.partition("=")
        if not argument.startswith("-"):
            overrides += _of_recipe(argument, argv)
        elif flag in _PLACES:
            places.append(_directory(value if has_value else _next(flag, rest), flag))
        elif flag in _SHOWN_ALONE:
            shown.append(argument)
        elif flag in _SHOWN:
            shown += [flag, value if has_value else _next(flag, rest)]
        elif argument in (*MULTIRUN, *_HELP, *_VERSION, *_ALREADY):
            seen.add(argument)
        else:
            raise UserError(_unknown(flag))
    return Arguments(
        tuple(overrides),
        not seen.isdisjoint(MULTIRUN),
        tuple(places),
        tuple(shown),
        not seen.isdisjoint(_HELP),
        not seen.isdisjoint(_VERSION),
        shlex.join([*_program(), *argv]),
    )


def _program() -> list[str]:
    name = Path(sys.argv[0]).name
    return [name] if name == "eaft-prune" else ["python", "-m", "eaft_prune"]


def _next(flag: str, rest: Iterator[str]) -> str:
    value = next(rest, None)
    if value is None:
        raise UserError(f"{flag} needs a value")
    return value


def _directory(path: str, flag: str) -> Path:
    found = resolve_path(path)
    if not found.is_dir():
        raise UserError(f"{flag} = {path!r}: no such directory")
    return found


def _unknown(flag: str) -> str:
    if flag in _ELSEWHERE:
        return f"{flag} is not for this program: {_ELSEWHERE[flag]}"
    close = nearest(flag, [known for known in _KNOWN if known not in _ELSEWHERE])
    hint = f"did you mean {close}? " if close else ""
    return f"{flag}: no such flag; {hint}--help lists them, settings are given as section.key=value"


def _of_recipe(argument: str, argv: Sequence[str]) -> list[str]:
    """recipe=FILE as the overrides the recipe stands for: what comes later overrides them.

    Raises UserError where it names a module to import, unless the user has typed that too.
    """
    name, _, path = argument.partition("=")
    if name != "recipe":
        return [argument]
    settings = read_recipe(resolve_path(path)).settings
    for setting, value in runs_code(settings).items():
        if f"{setting}={value}" not in argv:
            raise UserError(
                f"{argument} imports a module: {setting}={value}; read it, then give that on the "
                "command line too"
            )
    return [
        f"{section}.{key}={written(value)}"
        for section, values in settings.items()
        for key, value in values.items()
    ]
