"""The launcher's settings, `hydra.launcher.*`; there is no such option without submitit."""

# no annotations from the future: Hydra runs this before it is a module, and dataclasses look it up
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from hydra.core.config_store import ConfigStore


@dataclass
class SlurmSettings:
    """What each point asks of Slurm; null leaves it to the cluster."""

    _target_: str = "hydra_plugins.eaft_slurm.launcher.SlurmLauncher"
    folder: str = "${hydra.sweep.dir}/.slurm/%j"  # batch script and logs of each job
    name: str = "${hydra.job.name}"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    gres: str | None = None
    timeout_min: int = 240
    cpus_per_task: int = 4  # and so many threads, unless runtime.threads says otherwise
    mem_gb: float | None = 16.0  # a job without it often gets its node's whole memory
    gpus_per_node: int | None = None
    array_parallelism: int = 256  # jobs that may run at once
    signal_delay_s: int = 120  # notice before the time limit
    setup: list[str] | None = None  # shell lines before the job
    additional_parameters: dict[str, Any] = field(default_factory=dict)  # of sbatch
    # what becomes of the jobs when the waiting command is ended: cancel, leave, or ask, which
    # leaves them where nobody can be asked
    when_stopped: str = "ask"


if find_spec("submitit") is not None:
    ConfigStore.instance().store(
        group="hydra/launcher", name="eaft_slurm", node=SlurmSettings(), provider="eaft_slurm"
    )
