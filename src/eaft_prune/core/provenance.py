"""Which process, which code, which settings: what a run says of where it came from."""

from __future__ import annotations

import getpass
import json
import os
import re
import shlex
import socket
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

COMMAND = "EAFT_PRUNE_COMMAND"  # in the environment of jobs: what was typed

HOST = "process.host"
_PID = "process.pid"
_STARTED = "process.started"
_NAMESPACE = "process.namespace"


@dataclass(frozen=True)
class GitState:
    """The commit of a repository, and how its working tree differs from it."""

    commit: str
    branch: str
    status: str  # `git status --porcelain`: empty when clean
    diff: str

    @property
    def tags(self) -> dict[str, str]:
        return {
            "mlflow.source.git.commit": self.commit,
            "mlflow.source.git.branch": self.branch,
            "mlflow.source.git.dirty": "true" if self.status else "false",
        }


@lru_cache(maxsize=1)
def git_of_code() -> GitState | None:
    """State of the repository of this package, as it was when first asked: what was imported."""
    return git_state(Path(__file__).parents[1] / "__init__.py")


def git_state(file: Path) -> GitState | None:
    """State of the repository that has this file, else None.

    An installed package may lie in a repository of somebody else's: that does not count.
    """
    directory = file.parent
    commit = _git(directory, "rev-parse", "--verify", "HEAD")
    if commit is None or _git(directory, "ls-files", "--error-unmatch", file.name) is None:
        return None
    return GitState(
        commit=commit.strip(),
        branch=(_git(directory, "rev-parse", "--abbrev-ref", "HEAD") or "").strip(),
        status=_git(directory, "status", "--porcelain") or "",
        diff=_git(directory, "diff", "HEAD", "--no-color", "--no-ext-diff") or "",
    )


def _git(directory: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(directory), *arguments],
            capture_output=True,
            # a reader must not take the lock of an index that someone is committing
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
            check=False,
        )
    except FileNotFoundError:  # git is not installed
        return None
    return done.stdout.decode(errors="replace") if done.returncode == 0 else None


def process_tags() -> dict[str, str]:
    """Tags that identify this process among all that this host ever runs."""
    pid = os.getpid()
    return {
        HOST: socket.gethostname(),
        _PID: str(pid),
        _STARTED: f"{psutil.Process(pid).create_time():.2f}",
        _NAMESPACE: _pid_namespace(),
    }


def is_dead(tags: Mapping[str, str]) -> bool:
    """True if `process_tags` of another run name a process of this host that is gone.

    False whenever that cannot be known from here: another host, another pid namespace (containers
    may share a host name), no tags.
    """
    if not {HOST, _PID, _STARTED, _NAMESPACE} <= tags.keys():
        return False
    if tags[HOST] != socket.gethostname() or tags[_NAMESPACE] != _pid_namespace():
        return False
    try:
        process = psutil.Process(int(tags[_PID]))
        if process.status() == psutil.STATUS_ZOMBIE:
            return True
        # the start time is derived from the boot time, which clock adjustments move a little
        return bool(abs(process.create_time() - float(tags[_STARTED])) > 2)
    except psutil.NoSuchProcess:
        return True


def describe_process(tags: Mapping[str, str]) -> str:
    return f"process {tags[_PID]} on {tags[HOST]}"


def _pid_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:  # not Linux
        return "none"


def command(overrides: Sequence[str]) -> str:
    """The command line as it was typed, without passwords; else one that does the same."""
    typed = os.environ.get(COMMAND)
    return redact(typed or shlex.join(["python", "-m", "eaft_prune", *overrides]))


def source_tags(command: str) -> dict[str, str]:
    """MLflow's own tags for user and source."""
    tags = {"mlflow.source.type": "LOCAL", "mlflow.source.name": redact(command)}
    try:
        tags["mlflow.user"] = getpass.getuser()
    except (KeyError, OSError, ImportError):  # an id without an account, as in many containers
        tags["mlflow.user"] = "unknown"
    return tags


def flatten(values: Mapping[str, Any], separator: str = ".", prefix: str = "") -> dict[str, Any]:
    """Leaves of nested mappings under joined names; an empty mapping is a leaf."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, separator, f"{prefix}{name}{separator}")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def as_text(value: Any) -> str:
    """A value as it reads in a table: text as it is, everything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def redact(text: str) -> str:
    """Text with the password (and user) of every URL in it replaced by ***."""
    return re.sub(r"://[^/@\s:]*:[^/@\s]+@", "://***@", text)


def one_line(error: BaseException) -> str:
    """First line of what an error says, without passwords, never empty."""
    lines = str(error).strip().splitlines()
    return redact(lines[0].strip() if lines else type(error).__name__)


def installed(package: str) -> str:
    """Its version, or "not installed"."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
