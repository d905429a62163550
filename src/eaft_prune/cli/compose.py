"""Hydra composes; every job of a command line is checked before the first one runs."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from eaft_prune.cli.arguments import Arguments
from eaft_prune.cli.grammar import as_typed, literal, quoted, written
from eaft_prune.cli.places import SEARCHPATH, absolute, config_root, folder_of, groups, options_in
from eaft_prune.config import Experiment, nearest, nodes, setting_names, unknown
from eaft_prune.core.provenance import COMMAND
from eaft_prune.core.types import UserError

_OPEN_SETTINGS = (  # keys are the user's
    "packs.files",
    "pruning.pack_weights",
    "tracking.tags",
    "eval.num_blocks",
    "gate.packs",
    "beside.packs",
    "beside.metrics",
    "gate.metrics",
    "replay.set",
    "search.space",
    "search.sampler.arguments",
    "engine.env",
)
_OPEN_KEYS = tuple(f"{name}." for name in _OPEN_SETTINGS)


@dataclass(frozen=True)
class Invocation:
    """A checked command line: every point composes and validates."""

    arguments: tuple[str, ...]  # for Hydra's multirun
    points: tuple[tuple[str, ...], ...]  # overrides of each job
    multirun: bool
    out: Path
    experiments: tuple[Experiment, ...]
    typed: str  # the whole command line, as a shell takes it
    composed: DictConfig  # of the first point, Hydra's own settings with it


@cache
def register_defaults() -> None:
    """Let conf/config.yaml and conf/task name the settings' own defaults, beneath all options."""
    for name, node in nodes():
        ConfigStore.instance().store(name=name, node=node, package="_global_")


def shown(arguments: Arguments) -> list[str]:
    """Overrides for Hydra's flags that run nothing; raises UserError where they do not compose."""
    with _composing():
        lines, _ = _overrides(arguments)
        fixed = [o.input_line for o in _parsed(lines) if not o.is_sweep_override()]
        _compose([str(line) for line in fixed])
    return lines


def check(arguments: Arguments) -> Invocation:
    """Compose and validate every job; raises UserError before anything runs."""
    with _composing():
        overrides, places = _overrides(arguments)
        parsed = _parsed(overrides)
        fixed = [o.input_line for o in parsed if not o.is_sweep_override()]
        whole = _compose([str(line) for line in fixed])
        multirun = arguments.multirun or str(whole.hydra.mode).endswith("MULTIRUN")
        if not multirun:
            points = [overrides]
            composed = [whole if len(fixed) == len(parsed) else _compose(overrides)]
        else:
            from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

            params = [f"{k}={v}" for k, v in (whole.hydra.sweeper.get("params") or {}).items()]
            swept = _parsed([*params, *overrides])
            for override in swept:
                _check_override(override, places)
            points = BasicSweeper.split_arguments(swept, max_batch_size=None)[0]
            composed = _compose_points(points)
        experiments = [_validate(one) for one in composed]
    section = "sweep" if multirun else "run"
    out = Path(str(whole.hydra[section].dir)).resolve()
    if "${" in f"{out} {Path.cwd()}":
        raise UserError(
            f"hydra.{section}.dir = {str(out)!r}: Hydra takes ${{ in the name of this or the "
            "working directory for an interpolation: use directories without it"
        )
    command = quoted(arguments.typed)  # for the job, whatever launches it
    pinned = (f"hydra.{section}.dir={quoted(str(out))}", f"+hydra.job.env_set.{COMMAND}={command}")
    if not multirun:
        OmegaConf.update(composed[0], "hydra.run.dir", str(out))
        typed = literal(arguments.typed)
        OmegaConf.update(composed[0], f"hydra.job.env_set.{COMMAND}", typed, force_add=True)
    return Invocation(
        (*overrides, *pinned),
        tuple(map(tuple, points)),
        multirun,
        out,
        tuple(experiments),
        arguments.typed,
        composed[0],
    )


def container(settings: DictConfig) -> dict[str, Any]:
    """Settings as plain values, every interpolation resolved."""
    values = OmegaConf.to_container(settings, resolve=True, throw_on_missing=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


class _composing:
    """Hydra ready to compose; what it raises is one line for the user."""

    def __enter__(self) -> None:
        register_defaults()
        self._hydra = hydra.initialize_config_dir(str(config_root() / "conf"), version_base="1.3")
        self._hydra.__enter__()

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._hydra.__exit__(kind, error, trace)
        match error:
            case MissingMandatoryValue():
                raise UserError(_missing(error)) from None
            case HydraException() | OmegaConfBaseException():
                raise UserError(_plain(error)) from None


def _overrides(arguments: Arguments) -> tuple[list[str], list[str]]:
    """The overrides, checked, as Hydra is to see them, and the places of options."""
    parsed = _parsed([_readable(line) for line in arguments.overrides])
    places = _places(arguments, parsed)
    kept = [override for override in parsed if override.key_or_group != SEARCHPATH]
    for override in kept:
        _check_override(override, places)
    lines = [line for override in kept for line in _replacing(override)]
    return [f"{SEARCHPATH}={written(places)}", *lines], places


def _parsed(lines: Sequence[str]) -> list[Override]:
    parsed: list[Override] = OverridesParser.create().parse_overrides(list(lines))
    return parsed


def _readable(line: str) -> str:
    """The override; where Hydra's grammar wants quotes around its value, with them."""
    key, separator, value = line.partition("=")
    for candidate in (line, f"{key}={as_typed(value)}"):
        with contextlib.suppress(OverrideParseException):
            if key.partition("@")[0].strip("+~ ") and (separator or key.startswith("~")):
                _parsed([candidate])
                return candidate
    raise UserError(f"{line!r} cannot be read: give section.key=VALUE or group=OPTION, see --help")


def _places(arguments: Arguments, parsed: Sequence[Override]) -> list[str]:
    """Where options are looked for besides conf/: our sweeps' parent, then the user's."""
    theirs = [f"file://{place}" for place in arguments.places]
    for override in parsed:
        if override.key_or_group == SEARCHPATH:
            value = override.value()
            theirs += [value] if isinstance(value, str) else [str(item) for item in value or ()]
    return list(dict.fromkeys([f"file://{config_root()}", *map(absolute, theirs)]))


def _compose(overrides: Sequence[str]) -> DictConfig:
    composed: DictConfig = hydra.compose("config", list(overrides), return_hydra_config=True)
    return composed


def _compose_points(points: Sequence[Sequence[str]]) -> list[DictConfig]:
    """Every point of a sweep.

    Hydra sets values after it has merged all options: points that differ by values alone are what
    they have in common, composed once, with those set.
    """
    shared = [line for line in points[0] if all(line in point for point in points)]
    changes = [_parsed([line for line in point if line not in shared]) for point in points]
    values = set(setting_names()) - set(groups())
    if any(one.type is not OverrideType.CHANGE or one.key_or_group not in values
           for change in changes for one in change):  # fmt: skip
        return [_compose(point) for point in points]
    common, composed = _compose(shared), list[DictConfig]()
    for change in changes:
        composed.append(copy.deepcopy(common))
        for one in change:
            OmegaConf.update(composed[-1], one.key_or_group, one.value(), merge=True)
    return composed


def _validate(composed: DictConfig) -> Experiment:
    from eaft_prune.tasks import validated  # half a second of imports that a typo need not wait for

    values = OmegaConf.masked_copy(composed, [str(k) for k in composed if k != "hydra"])
    return validated(container(values))


def _check_override(override: Override, places: Sequence[str]) -> None:
    key = override.key_or_group
    if key.split(".")[0] == "hydra" or key.startswith("hydra/"):
        return
    folders = groups()
    if key in folders:
        _check_choice(override, places, folders[key])
        return
    names = setting_names()
    if key not in names and not key.startswith(_OPEN_KEYS):
        close = nearest(key, [*names, *folders])
        groups_there = "" if close else f"; groups: {', '.join(folders)}"
        raise UserError(unknown(key, close) + groups_there)


def _check_choice(override: Override, places: Sequence[str], folder: Path) -> None:
    """The options chosen of a group are there, each in one place."""
    key, ours = override.key_or_group, options_in(folder)
    theirs = {place: options_in(folder_of(place) / key) for place in places[1:]}
    known = sorted({*ours, *(name for names in theirs.values() for name in names)})
    for value in _values(override):
        if not isinstance(value, str):
            continue
        if value not in known:
            close = nearest(value, known)
            hint = f"did you mean {key}={close}? " if close else ""
            raise UserError(f"{key} = {value!r}: {hint}allowed: {', '.join(known)}")
        where = [f"{place}/{key}" for place, names in theirs.items() if value in names]
        where = [f"file://{folder}"] * (value in ours) + where
        if len(where) > 1:
            raise UserError(
                f"{key} = {value!r} is in {' and in '.join(where)}: give your own another name"
            )


def _replacing(override: Override) -> list[str]:
    """An override as Hydra is to see it: mappings with the user's own keys are replaced whole."""
    line, key = str(override.input_line), override.key_or_group
    if override.type is not OverrideType.CHANGE or override.is_sweep_override():
        return [line]
    if key in _OPEN_SETTINGS:
        return [f"~{key}", f"+{line}"]
    return [f"++{line}"] if key.startswith(_OPEN_KEYS) else [line]


def _values(override: Override) -> list[Any]:
    if override.is_sweep_override():
        return list(override.sweep_iterator())
    return [override.value()]


def _missing(error: MissingMandatoryValue) -> str:
    key = str(error).split(":")[-1].strip().splitlines()[0]
    return f"{key} is missing: give {key}=VALUE"


def _plain(error: Exception) -> str:
    return " ".join(line.strip() for line in str(error).splitlines() if line.strip())
