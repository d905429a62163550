"""A Slurm of one node on loopback: munged, slurmctld and slurmd of this machine, stopped by pid."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil

DAEMONS = ("munged", "slurmctld", "slurmd")

_CONF = """
ClusterName=alone
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={home}/munge.socket
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmctldPort={controller}
SlurmdPort={node}
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={home}/slurmd.pid
SlurmctldLogFile={home}/slurmctld.log
SlurmdLogFile={home}/slurmd.log
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/spool
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
KillWait=5
MinJobAge={remembered}
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={memory} State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""
_CGROUP = "CgroupPlugin=cgroup/v1\nConstrainCores=no\nConstrainDevices=no\nConstrainRAMSpace=no\n"


def missing() -> str:
    """Why no Slurm can be started here, or nothing."""
    search = os.environ["PATH"] + ":/usr/sbin:/sbin"
    absent = [name for name in (*DAEMONS, "sbatch") if shutil.which(name, path=search) is None]
    if absent:
        return f"{', '.join(absent)} not installed (apt-get install slurm-wlm munge)"
    return "" if os.geteuid() == 0 else "slurmd wants to be started by root"


@contextmanager
def cluster(home: Path, cpus: int, remembered: int = 300) -> Iterator[Mapping[str, str]]:
    """The environment in which sbatch and squeue find a Slurm that runs until the end.

    remembered: seconds after which the controller forgets a job that ended.
    """
    for part in ("state", "spool"):
        (home / part).mkdir(parents=True)
    home.chmod(0o755)
    controller, node = _free_ports()
    host = socket.gethostname().partition(".")[0]
    memory = psutil.virtual_memory().total >> 20
    conf = _CONF.format(
        host=host,
        home=home,
        controller=controller,
        node=node,
        cpus=cpus,
        memory=memory,
        remembered=remembered,
    )
    (home / "slurm.conf").write_text(conf)
    (home / "cgroup.conf").write_text(_CGROUP)
    key = home / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    environment = {"SLURM_CONF": str(home / "slurm.conf")}
    munged = ["munged", "--foreground", "--force", f"--key-file={key}"]
    munged += [f"--socket={home}/munge.socket", f"--log-file={home}/munged.log"]
    munged += [f"--pid-file={home}/munged.pid", f"--seed-file={home}/munge.seed"]
    with ExitStack() as stack:
        stack.enter_context(_daemon(munged, environment, home))
        stack.enter_context(_daemon(["slurmctld", "-D", "-i"], environment, home))
        stack.enter_context(_daemon(["slurmd", "-D", "-N", host], environment, home))
        _until_idle(environment)
        yield environment


@contextmanager
def _daemon(command: list[str], environment: Mapping[str, str], home: Path) -> Iterator[None]:
    search = os.environ["PATH"] + ":/usr/sbin:/sbin"
    program = shutil.which(command[0], path=search)
    assert program is not None, command[0]
    with (home / f"{command[0]}.out").open("w") as out:
        started = subprocess.Popen(
            [program, *command[1:]],
            env={**os.environ, **environment},
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield
    finally:
        family = psutil.Process(started.pid).children(recursive=True)
        started.terminate()
        try:
            started.wait(20)
        except subprocess.TimeoutExpired:
            started.kill()
            started.wait()
        for child in family:  # slurmstepd and what it started outlive slurmd by design
            try:
                child.kill()
            except psutil.NoSuchProcess:
                continue


def ask(environment: Mapping[str, str], *command: str) -> str:
    """What a program of Slurm's says."""
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or done.stderr.strip()


def _until_idle(environment: Mapping[str, str]) -> None:
    """Ask until the node takes jobs: each question waits for the controller itself."""
    for _ in range(200):
        said = ask(environment, "sinfo", "-h", "-o", "%T")
        if said == "idle":
            return
        subprocess.run(["sleep", "0.2"], check=True)
    raise AssertionError(f"the node never was idle: {said}")


def _free_ports() -> tuple[int, int]:
    with socket.socket() as one, socket.socket() as other:
        one.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        return one.getsockname()[1], other.getsockname()[1]
