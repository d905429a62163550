"""A checked command line runs: by Hydra, its points one by one or as a launcher has it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.callbacks import Callbacks
from hydra._internal.utils import run_and_report
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import configure_log, run_job
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf

from eaft_prune.cli import compose, exits
from eaft_prune.cli import job as runner
from eaft_prune.cli.compose import Invocation, container
from eaft_prune.cli.multirun import PARENT, print_plan, run_multirun
from eaft_prune.cli.places import config_root
from eaft_prune.config import Experiment
from eaft_prune.core.types import UserError
from eaft_prune.packs.sources import check_there
from eaft_prune.records.results import load_result
from eaft_prune.tasks import task_of
from eaft_prune.tracking import Terminated, signals_raise


def launch(invocation: Invocation) -> int:
    """Run every point, or say what would run; returns the exit code."""
    if invocation.experiments[0].sweep.plan_only:
        return print_plan(invocation)
    try:
        invocation.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        section = "sweep" if invocation.multirun else "run"
        where = f"hydra.{section}.dir = {str(invocation.out)!r}"
        print(f"error: {where} cannot be written: {error.strerror}", file=sys.stderr)
        return exits.MISUSED
    if invocation.experiments[0].runtime.progress:
        print(_first_line(invocation), file=sys.stderr, flush=True)
    if invocation.multirun:
        code = run_multirun(invocation, hydra_sweeps)
    else:
        code = _hydra_runs(invocation.composed) or _exit_code(invocation.out)
    if code == exits.INTERRUPTED:
        print("interrupted; the same command goes on from here", file=sys.stderr)
    return code


def _first_line(invocation: Invocation) -> str:
    """What begins now: libraries and models take seconds to load and say nothing."""
    first = invocation.experiments[0]
    jobs = f"{len(invocation.experiments)} jobs: " if invocation.multirun else ""
    words = [f"task={first.task.name}"]
    reads = task_of(first).reads
    words += [f"model={first.model.name}"] if "model" in reads else []
    words += [f"packs={first.packs.name}"] if "packs" in reads else []
    return f"{jobs}{' '.join(words)}, results in {invocation.out}"


def check_sources(experiment: Experiment) -> None:
    """Raise UserError where what the task reads is not here, before MLflow and torch are."""
    reads = task_of(experiment).reads
    check_there(
        experiment.model if "model" in reads else None,
        experiment.packs if "packs" in reads else None,
    )


def job(settings: DictConfig) -> int:
    """One Hydra job; its exit code goes into result.json, where every launcher can leave it."""
    hydra_config = HydraConfig.get()
    values = container(settings)
    out = Path(hydra_config.runtime.output_dir)
    overrides = [str(o) for o in hydra_config.overrides.task if not str(o).startswith(PARENT)]
    number = None if OmegaConf.is_missing(hydra_config.job, "num") else hydra_config.job.num
    # relative paths are those of where the command was typed, whatever hydra.job.chdir says
    with contextlib.chdir(hydra_config.runtime.cwd):
        return runner.run(values, out, overrides, number)


def hydra_shows(arguments: Sequence[str]) -> int:
    """Hydra's own main with a flag that runs nothing; returns the exit code."""
    # argparse takes no positional after an option between positionals
    sys.argv = ["eaft-prune", *arguments]
    conf = str(config_root() / "conf")
    entry = hydra.main(config_path=conf, config_name="config", version_base="1.3")(job)
    return _code_of(entry)


def hydra_sweeps(arguments: Sequence[str]) -> int:
    """Hydra's multirun of checked arguments; returns the exit code."""
    return _code_of(lambda: _with_hydra(lambda ours: ours.multirun("config", job, list(arguments))))


def _hydra_runs(composed: DictConfig) -> int:
    """Hydra's run of one composed job; returns the exit code."""

    def run(ours: Any) -> None:
        configure_log(composed.hydra.hydra_logging, composed.hydra.verbose)
        callbacks = Callbacks(composed)
        callbacks.on_run_start(config=composed, config_name="config")
        done = run_job(
            job, composed, "hydra.run.dir", None, HydraContext(ours.config_loader, callbacks)
        )
        callbacks.on_run_end(config=composed, config_name="config", job_return=done)
        _ = done.return_value  # raises what the job raised

    return _code_of(lambda: _with_hydra(run))


def _with_hydra(run: Callable[[Any], Any]) -> None:
    """What hydra.main does, which composes twice more what has been composed."""
    with hydra.initialize_config_dir(str(config_root() / "conf"), version_base="1.3"):
        ours = GlobalHydra.instance().hydra
        assert ours is not None, "it was initialised"
        run_and_report(lambda: run(ours))


def _code_of(entry: Callable[[], Any]) -> int:
    try:
        # around the run's own: a SIGTERM that comes while it closes must not cut its result off
        with signals_raise():
            compose.register_defaults()
            entry()
    except KeyboardInterrupt:
        return exits.INTERRUPTED
    except Terminated:
        return exits.TERMINATED
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    return exits.OK


def _exit_code(out: Path) -> int:
    try:
        return load_result(out).exit_code
    except UserError:
        return exits.CRASHED
