"""One run from Python: composed, checked and done by what the command line does it with."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

from eaft_prune.cli import compose, exits, job
from eaft_prune.cli.arguments import parse
from eaft_prune.cli.grammar import written
from eaft_prune.core.types import UserError
from eaft_prune.records.results import Result, load_result


class RunFailed(RuntimeError):
    """A run that started and did not finish; `result` has what it left."""

    def __init__(self, result: Result) -> None:
        super().__init__(result.error)
        self.result = result


def run(
    *overrides: str, out: str | Path | None = None, show: bool = False, **settings: Any
) -> Result:
    """Run one task, as `python -m eaft_prune *overrides` would; returns what it found.

    A setting may be given by name as well, with two underscores for its dot
    (`pruning__keep_n=24`, `task="frontier"`). out: the directory for results; by default one named
    after date and time in `outputs`. show: print what the command line prints. A verdict of FAIL is
    a result, whatever `gate.on_fail` says. Raises UserError where a setting is wrong, RunFailed
    where the run ends in an error.
    """
    given = [f"{name.replace('__', '.')}={written(value)}" for name, value in settings.items()]
    invocation = compose.check(parse([*overrides, *given]))
    if invocation.multirun or invocation.experiments[0].sweep.plan_only:
        raise UserError("run() does one job: call it in a loop; plans and sweeps are the shell's")
    place = invocation.out if out is None else Path(out).expanduser().resolve()
    values = invocation.experiments[0].model_dump(mode="json")
    with contextlib.nullcontext() if show else contextlib.redirect_stdout(io.StringIO()):
        code = job.run(values, place, [*overrides, *given])
    found = load_result(place)
    if code not in (exits.OK, exits.NOT_PROVEN):
        raise RunFailed(found)
    return found
