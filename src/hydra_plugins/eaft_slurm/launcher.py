"""submitit submits the points as one array of jobs; we wait until Slurm has done with each."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, run_job, setup_globals
from hydra.errors import CompactHydraException
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from eaft_prune.cli import endings
from hydra_plugins.eaft_slurm import _queue

log = logging.getLogger(__name__)

WHEN_STOPPED = ("ask", "cancel", "leave")
_SLOWEST = 15.0  # seconds between two questions to the controller
_PARTING = 60.0  # seconds that cancelled jobs have to be gone before the table is made
_COMMON = ("name", "timeout_min", "cpus_per_task", "mem_gb", "gpus_per_node")  # in submitit


class SlurmLauncher(Launcher):
    """A job of Slurm a point; `launch` returns when each has a result or is gone from the queue."""

    def __init__(self, folder: str, when_stopped: str, **wanted: Any) -> None:
        if when_stopped not in WHEN_STOPPED:
            raise CompactHydraException(
                f"hydra.launcher.when_stopped = {when_stopped!r}: allowed: "
                f"{', '.join(WHEN_STOPPED)}"
            )
        self.folder = folder
        self.when_stopped = when_stopped
        self.wanted = {
            key: OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
            for key, value in wanted.items()
        }
        self.queued: dict[int, endings.Queued] = {}

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.hydra_context = hydra_context
        self.task_function = task_function
        self.config = config

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        out = Path(str(self.config.hydra.sweep.dir))
        before = endings.results(out)
        points = range(initial_job_idx, initial_job_idx + len(job_overrides))
        try:
            self._submit(out, points, job_overrides)
            self._wait(out, before, None)
        except BaseException as error:
            if not isinstance(error, Exception):  # Ctrl-C, SIGTERM, SIGHUP
                self._part(out, before, isinstance(error, KeyboardInterrupt))
            raise
        # what each came to is in its result.json and in what the queue said
        return [JobReturn(status=JobStatus.COMPLETED, _return_value=None) for _ in points]

    def __call__(self, overrides: list[str], number: int, state: dict[Any, Any]) -> JobReturn:
        """One point, in its job."""
        import submitit

        if cpus := os.environ.get("SLURM_CPUS_PER_TASK"):
            os.environ["OMP_NUM_THREADS"] = cpus  # torch, not imported yet, counts the node's
        Singleton.set_state(state)
        setup_globals()
        config = self.hydra_context.config_loader.load_sweep_config(self.config, overrides)
        with open_dict(config):
            config.hydra.job.id = submitit.JobEnvironment().job_id
            config.hydra.job.num = number
        return run_job(
            hydra_context=self.hydra_context,
            task_function=self.task_function,
            config=config,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )

    def checkpoint(self, *arguments: Any) -> Any:
        """What a preempted job is queued again as: finished stages are in the store."""
        import submitit

        return submitit.helpers.DelayedSubmission(self, *arguments)

    def _submit(self, out: Path, points: range, overrides: Sequence[Sequence[str]]) -> None:
        import submitit

        out.mkdir(parents=True, exist_ok=True)
        try:
            executor = submitit.AutoExecutor(self.folder, cluster="slurm", slurm_max_num_timeout=0)
            executor.update_parameters(
                **{k if k in _COMMON else f"slurm_{k}": v for k, v in self.wanted.items()},
                # from 22.05 on srun does not take it from the batch job
                slurm_srun_args=[f"--cpus-per-task={self.wanted['cpus_per_task']}"],
            )
            state = Singleton.get_state()
            given = [list(map(list, overrides)), list(points), [state] * len(points)]
            jobs = executor.map_array(self, *given)
        except (RuntimeError, submitit.core.utils.FailedJobError) as error:
            said = " ".join(str(error).split())
            raise CompactHydraException(
                f"hydra/launcher=eaft_slurm: not submitted: {said}"
            ) from None
        shared = set.intersection(*map(set, overrides))
        for number, job, point in zip(points, jobs, overrides, strict=True):
            own = [o for o in point if o not in shared]
            log.info("#%d Slurm job %s %s", number, job.job_id, " ".join(own))
            self.queued[number] = endings.Queued(job.job_id, "", str(job.paths.stderr))
        endings.write_queue(out, self.queued)

    def _wait(self, out: Path, before: dict[Path, int], patience: float | None) -> None:
        """Until every job is done with, or patience, in seconds, ends."""
        pause, waited = 1.0, 0.0
        while True:
            self._look(out)
            left = endings.unfinished(out, before, self.queued)
            if not left or (patience is not None and waited >= patience):
                return
            time.sleep(pause)
            waited += pause
            pause = min(pause * 1.3, _SLOWEST)

    def _look(self, out: Path) -> None:
        now = _queue.states({job.id: job.state for job in self.queued.values()})
        self.queued = {n: job.now(now[job.id]) for n, job in self.queued.items()}
        endings.write_queue(out, self.queued)

    def _part(self, out: Path, before: dict[Path, int], by_hand: bool) -> None:
        """Do with the jobs that are left what `when_stopped` says."""
        self._look(out)
        left = [job.id for job in self.queued.values() if not job.ended]
        if not left:
            return
        command = f"scancel {' '.join(left)}"
        if self._cancels(len(left), by_hand):
            said = _queue.cancel(left)
            print(f"{command}: {said or 'done'}", file=sys.stderr, flush=True)
            self._wait(out, before, _PARTING)
        else:
            print(f"{len(left)} jobs go on; to end them: {command}", file=sys.stderr, flush=True)

    def _cancels(self, left: int, by_hand: bool) -> bool:
        if self.when_stopped != "ask":
            return self.when_stopped == "cancel"
        if not by_hand or not sys.stdin.isatty():
            return False
        try:
            answer = input(f"{left} jobs are still with Slurm: cancel them? [y/N] ")
        except (EOFError, KeyboardInterrupt):
            return False
        return answer.strip().lower() in ("y", "yes")
