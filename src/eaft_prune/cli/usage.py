"""--help and --version: what can be typed, without composing anything."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from textwrap import fill

from eaft_prune.cli.arguments import Arguments
from eaft_prune.cli.places import SWEEPS, folder_of, groups, options_in
from eaft_prune.config import Experiment
from eaft_prune.config.base import allowed
from eaft_prune.config.defaults import section_of
from eaft_prune.config.reference import rows
from eaft_prune.core.provenance import installed
from eaft_prune.core.types import UserError
from eaft_prune.report.terminal import listing
from eaft_prune.tasks import TASKS

_EXAMPLES = (
    ("eaft-prune", "the shipped demo: prune, evaluate, gate"),
    ("eaft-prune pruning.keep_n=24 eval.seed=1", "other settings"),
    ("eaft-prune pruning.keep_n=20 -m eval.seed=1,2,3", "one job a value"),
    ("eaft-prune +sweeps=criteria", "a prepared multirun"),
    ("eaft-prune model=local model.path=DIR", "a checkpoint of your own"),
    ("eaft-prune experiment=20b_keep24", "a published result"),
    ("eaft-prune --config-dir DIR experiment=mine", "options of your own"),
)
_FLAGS = (
    ("-m, --multirun", "one job for every combination of values separated by commas"),
    ("--config-dir DIR", "a directory of your own options, laid out as conf/ is, and sweeps/"),
    ("--cfg job", "print what a command line composes to, and run nothing"),
    ("--help SECTION ...", "the settings of pruning, eval, engine ..."),
    ("--version", "this program's version and that of what results depend on"),
    ("--shell-completion install=bash", 'eval "$(eaft-prune --shell-completion install=bash)"'),
)
_CODES = (
    ("0", "done"),
    ("1", "crashed"),
    ("2", "a setting or an input is wrong"),
    ("3", "not proven where gate.on_fail=error, or a replay or verification found a difference"),
    ("130, 143", "interrupted, terminated; the same command goes on"),
)
_DEPENDS = ("torch", "transformers", "triton", "mlflow", "hydra-core", "optuna", "numpy")


def help_text(arguments: Arguments) -> str:
    """Everything at a glance; with names of sections the settings of those."""
    if arguments.overrides:
        return "\n\n".join(map(_section, arguments.overrides))
    parts = [
        "eaft_prune: prune experts out of Mixture-of-Experts language models, and prove that "
        "nothing was lost.\n\nusage: eaft-prune [flags] [group=option ...] [section.key=value ...]",
        _pairs("examples", _EXAMPLES),
        _pairs("flags", _FLAGS),
        _pairs("tasks (task=NAME)", [(name, task.help) for name, task in TASKS.items()]),
        _pairs("groups (GROUP=OPTION)", list(_options(arguments))),
        "settings (SECTION.KEY=VALUE)\n"
        + fill(", ".join(_sections()), 96, initial_indent="  ", subsequent_indent="  ")
        + "\n  eaft-prune --help pruning explains those of pruning",
        _pairs("exit codes", _CODES),
    ]
    return "\n\n".join(parts)


def version_text() -> str:
    """Our version, then Python's and those of the packages results depend on."""
    others = [f"{name} {installed(name)}" for name in _DEPENDS]
    python = sys.version.split()[0]
    return f"eaft_prune {installed('eaft_prune')}\nPython {python}, {', '.join(others)}"


def _pairs(title: str, pairs: Sequence[tuple[str, str]]) -> str:
    width = max(len(left) for left, _ in pairs) + 2
    indent = " " * (width + 2)
    lines = [
        fill(right, 96, initial_indent=f"  {left:<{width}}", subsequent_indent=indent)
        for left, right in pairs
    ]
    return "\n".join([title, *lines])


def _options(arguments: Arguments) -> list[tuple[str, str]]:
    found = []
    for group, folder in groups().items():
        if group == "task":
            continue
        names = options_in(folder)
        for place in arguments.places:
            names += options_in(folder_of(f"file://{place}") / group)
        found.append((f"+{group}" if group == SWEEPS else group, ", ".join(names)))
    return found


def _sections() -> list[str]:
    fields = Experiment.model_fields
    return [name for name in fields if section_of(fields[name].annotation) is not None]


def _section(name: str) -> str:
    if name not in _sections():
        raise UserError(f"--help {name!r}: no such section; {allowed(name, _sections())}")
    section = section_of(Experiment.model_fields[name].annotation)
    assert section is not None
    plain = [[cell.replace("`", "") for cell in row] for row in rows(section, f"{name}.")]
    about = (section.__doc__ or "").strip().splitlines()[0]
    return f"{about}\n\n{listing(('setting', 'type', 'default', 'meaning'), plain)}"
