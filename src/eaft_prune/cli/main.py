"""The command line: Hydra composes, everything is checked, then jobs run."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from eaft_prune.cli import job as runner
from eaft_prune.cli.multirun import Invocation, print_plan, run_multirun
from eaft_prune.config import (
    Experiment,
    nearest,
    nodes,
    renamed,
    resolve_path,
    setting_names,
    unknown,
)
from eaft_prune.core.types import UserError
from eaft_prune.engines.world import is_helper, world_size
from eaft_prune.packs.sources import check_there
from eaft_prune.records.recipe import read_recipe
from eaft_prune.tasks import task_of, validated
from eaft_prune.tracking import Terminated

_MULTIRUN = ("-m", "--multirun")
_OPEN_SETTINGS = (  # keys are the user's
    "packs.files",
    "pruning.pack_weights",
    "tracking.tags",
    "eval.num_blocks",
    "gate.packs",
    "gate.metrics",
    "replay.set",
    "search.space",
    "search.sampler.arguments",
    "engine.env",
)
_OPEN_KEYS = tuple(f"{name}." for name in _OPEN_SETTINGS)
_OPTIONAL_GROUPS = ("sweeps",)


def config_root() -> Path:
    """The directory that holds conf/ and sweeps/: in a wheel the package, else the repository."""
    package = Path(__file__).resolve().parents[1]
    for root in (package, package.parents[1]):
        if (root / "conf" / "config.yaml").is_file():
            return root
    raise FileNotFoundError(f"neither {package} nor {package.parents[1]} holds conf/config.yaml")


@cache
def register_defaults() -> None:
    """Let conf/config.yaml and conf/task name the settings' own defaults, beneath all options."""
    for name, node in nodes():
        ConfigStore.instance().store(name=name, node=node, package="_global_")


def main(argv: Sequence[str]) -> int:
    """Run the command line; returns the exit code.

    0 done, 1 crashed, 2 a setting or input is wrong, 3 the gate failed and gate.on_fail=error, or a
    replay or verification found a difference, 130 interrupted, 143 terminated.
    """
    if world_size() == 1:
        return _main(argv)
    from eaft_prune.engines import loading, parallel

    if is_helper():
        return parallel.serve(loading.load_files)
    try:
        return _main(argv)
    finally:
        parallel.stop()


def _main(argv: Sequence[str]) -> int:
    register_defaults()
    arguments = _multirun_first(argv)
    try:
        arguments = [part for argument in arguments for part in _of_recipe(argument)]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return runner.MISUSED
    flags = [a for a in arguments if a.startswith("-") and a not in _MULTIRUN]
    if flags:  # --help, --cfg and their kin run nothing
        return _hydra(arguments)
    try:
        invocation = check(arguments)
        for experiment in invocation.experiments:
            _check_sources(experiment)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return runner.MISUSED
    if invocation.experiments[0].sweep.plan_only:
        return print_plan(invocation)
    if invocation.multirun:
        return run_multirun(invocation, _hydra)
    code = _hydra(invocation.arguments)
    return code or _exit_code(invocation.out)


def check(arguments: Sequence[str]) -> Invocation:
    """Compose and validate every job; raises UserError before anything runs."""
    register_defaults()
    multirun = any(a in _MULTIRUN for a in arguments)
    # sweeps/ lies beside conf/, so its parent is a second place to search
    overrides = [
        f"hydra.searchpath=[{_quoted('file://' + str(config_root()))}]",
        *(a for a in arguments if a not in _MULTIRUN),
    ]
    try:
        with hydra.initialize_config_dir(str(config_root() / "conf"), version_base="1.3"):
            parser = OverridesParser.create()
            parsed = parser.parse_overrides(overrides)
            for override in parsed:
                _check_override(override)
            overrides = [line for override in parsed for line in _replacing(override)]
            parsed = parser.parse_overrides(overrides)
            fixed = [o.input_line for o in parsed if not o.is_sweep_override()]
            whole = _compose([str(line) for line in fixed])
            multirun = multirun or str(whole.hydra.mode).endswith("MULTIRUN")
            if not multirun:
                points = [overrides]
                composed = [whole if len(fixed) == len(parsed) else _compose(overrides)]
            else:
                from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

                params = [f"{k}={v}" for k, v in (whole.hydra.sweeper.get("params") or {}).items()]
                swept = parser.parse_overrides([*params, *overrides])
                for override in swept:
                    _check_override(override)
                points = BasicSweeper.split_arguments(swept, max_batch_size=None)[0]
                composed = [_compose(point) for point in points]
            experiments = [_validate(one) for one in composed]
    except MissingMandatoryValue as error:
        raise UserError(_missing(error)) from None
    except OverrideParseException as error:
        raise UserError(f"{error.override!r} cannot be parsed: {_plain(error)}") from None
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_plain(error)) from None
    section = "sweep" if multirun else "run"
    out = Path(str(whole.hydra[section].dir)).resolve()
    pinned = [f"hydra.{section}.dir={_quoted(str(out))}", *(["-m"] if multirun else [])]
    return Invocation(
        (*overrides, *pinned), tuple(map(tuple, points)), multirun, out, tuple(experiments)
    )


def _check_sources(experiment: Experiment) -> None:
    """Raise UserError where what the task reads is not here, before MLflow and torch are."""
    reads = task_of(experiment).reads
    check_there(
        experiment.model if "model" in reads else None,
        experiment.packs if "packs" in reads else None,
    )


def job(settings: DictConfig) -> int:
    """One Hydra job; its exit code goes into result.json, where every launcher can leave it."""
    hydra_config = HydraConfig.get()
    values = _container(settings)
    out = Path(hydra_config.runtime.output_dir)
    overrides = [str(o) for o in hydra_config.overrides.task]
    number = None if OmegaConf.is_missing(hydra_config.job, "num") else hydra_config.job.num
    return runner.run(values, out, overrides, number)


def _hydra(arguments: Sequence[str]) -> int:
    sys.argv = ["eaft_prune", *_multirun_first(arguments)]
    entry = hydra.main(
        config_path=str(config_root() / "conf"), config_name="config", version_base="1.3"
    )(job)
    try:
        entry()
    except KeyboardInterrupt:
        return runner.INTERRUPTED
    except Terminated:
        return runner.TERMINATED
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    return runner.OK


def _of_recipe(argument: str) -> list[str]:
    """recipe=FILE as the overrides the recipe stands for: what comes later overrides them."""
    name, _, path = argument.partition("=")
    if name != "recipe":
        return [argument]
    settings = renamed(read_recipe(resolve_path(path)).settings)
    return [
        f"{section}.{key}={_quoted(value) if isinstance(value, str) else json.dumps(value)}"
        for section, values in settings.items()
        for key, value in values.items()
    ]


def _exit_code(out: Path) -> int:
    try:
        return int(json.loads((out / "result.json").read_text())["exit_code"])
    except (OSError, ValueError, KeyError):
        return runner.CRASHED


def _multirun_first(argv: Sequence[str]) -> list[str]:
    # argparse takes no positional after an option between positionals, so the option goes first
    rest = [a for a in argv if a not in _MULTIRUN]
    return ["-m", *rest] if len(rest) < len(argv) else rest


def _compose(overrides: Sequence[str]) -> DictConfig:
    composed: DictConfig = hydra.compose("config", list(overrides), return_hydra_config=True)
    return composed


def _validate(composed: DictConfig) -> Experiment:
    values = OmegaConf.masked_copy(composed, [str(k) for k in composed if k != "hydra"])
    return validated(_container(values))


def _container(settings: DictConfig) -> dict[str, Any]:
    values = OmegaConf.to_container(settings, resolve=True, throw_on_missing=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def _check_override(override: Override) -> None:
    key = override.key_or_group
    if key.split(".")[0] == "hydra" or key.startswith("hydra/"):
        return
    root = config_root()
    groups = sorted(p.name for p in (root / "conf").iterdir() if p.is_dir())
    if key in (*groups, *_OPTIONAL_GROUPS):
        folder = root / ("sweeps" if key == "sweeps" else f"conf/{key}")
        options = sorted(p.stem for p in folder.glob("*.yaml") if not p.stem.startswith("_"))
        for value in _values(override):
            if isinstance(value, str) and value not in options:
                close = nearest(value, options)
                hint = f"did you mean {key}={close}? " if close else ""
                raise UserError(f"{key} = {value!r}: {hint}allowed: {', '.join(options)}")
        return
    names = setting_names()
    if key not in names and not key.startswith(_OPEN_KEYS):
        close = nearest(key, [*names, *groups])
        groups_there = "" if close else f"; groups: {', '.join(groups)}"
        raise UserError(unknown(key, close) + groups_there)


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


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
