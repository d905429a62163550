"""The command line: flags apart and everything checked, before what runs is even imported."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from eaft_prune.cli import compose, exits
from eaft_prune.cli.arguments import COMPLETION, parse
from eaft_prune.cli.compose import Invocation
from eaft_prune.core.types import UserError
from eaft_prune.engines.world import is_helper, world_size


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


def check(argv: Sequence[str]) -> Invocation:
    """Every job of a command line, composed and validated; raises UserError, runs nothing."""
    return compose.check(parse(argv))


def _main(argv: Sequence[str]) -> int:
    try:
        arguments = parse(argv)
        if arguments.version or arguments.help:
            from eaft_prune.cli.usage import help_text, version_text

            print(version_text() if arguments.version else help_text(arguments))
            return exits.OK
        if arguments.shown:
            completion = not COMPLETION.isdisjoint(arguments.shown)
            overrides = arguments.overrides if completion else compose.shown(arguments)
            from eaft_prune.cli import launch  # a typo is told before seconds of imports

            return launch.hydra_shows([*arguments.shown, *overrides])
        invocation = compose.check(arguments)
        from eaft_prune.cli import launch

        for experiment in invocation.experiments:
            launch.check_sources(experiment)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return exits.MISUSED
    return launch.launch(invocation)
