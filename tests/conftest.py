"""What the core tests share: one tiny checkpoint, its engine and its blocks."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import pytest
import torch
from hypothesis import settings
from support import tiny
from support.engines import options

from eaft_prune.core.types import Blocks

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read where triton is imported first, by whomever

if TYPE_CHECKING:
    from eaft_prune.engines.transformers import TransformersEngine

# derandomized: a red test is red again; no deadline: this is about values, not about time
settings.register_profile("core", deadline=None, derandomize=True, database=None, max_examples=40)
settings.load_profile("core")

QUICK = "quick"  # -m of `make quick`


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """`make quick` leaves out what starts processes, trains, or runs whole command lines."""
    if not config.getoption(QUICK):
        return
    slow = ("process", "slow", "dear", "gpu", "browser", "postgres", "slurm")
    kept = [
        item
        for item in items
        if not any(item.get_closest_marker(name) for name in slow)
        and not {"world", "pipeline"} & set(getattr(item, "fixturenames", ()))
    ]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def pytest_configure(config: pytest.Config) -> None:
    """A run that is ended leaves no process behind: SIGTERM ends it as an exit does."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    atexit.register(_end_children)


def _end_children() -> None:
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            child.kill()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--quick", action="store_true", dest=QUICK, help="no process is started, nothing trained"
    )


@pytest.fixture(autouse=True, scope="session")
def _no_terminal() -> None:
    """Tables are whole here; readline, which a test runner imports, exports a width."""
    os.environ.pop("COLUMNS", None)


@pytest.fixture(autouse=True)
def _no_process_in_a_quick_run(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the marker `process` cannot be forgotten."""
    if not request.config.getoption(QUICK):
        return

    def refused(*args: Any, **kwargs: Any) -> None:
        pytest.fail("starts a process: give it the marker `process`")

    monkeypatch.setattr(subprocess.Popen, "__init__", refused)
    monkeypatch.setattr(os, "fork", refused)
    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", refused)


def _unwanted(config: pytest.Config) -> list[Any]:
    """Skips that CI does not take: of what is marked as needing what CI has not."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("CI") != "true" or reporter is None or hasattr(config, "workerinput"):
        return []
    skipped = reporter.stats.get("skipped", ())
    elsewhere = {"gpu", "slurm", "server", "harness"}
    return [one for one in skipped if not elsewhere & set(one.keywords)]


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if _unwanted(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for one in _unwanted(config):
        terminalreporter.write_line(f"SKIPPED IN CI, which fails it: {one.nodeid}", red=True)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny MXFP4 checkpoint of two shards; read-only by agreement."""
    return tiny.write_checkpoint(tmp_path_factory.mktemp("core") / "base")


@pytest.fixture(scope="session")
def load() -> Callable[..., TransformersEngine]:
    """An engine on a checkpoint: `load(path, dtype=..., batch_tokens=...)`."""

    def loaded(path: Path, **runtime: Any) -> TransformersEngine:
        from eaft_prune.checkpoints.read import open_model
        from eaft_prune.engines.loading import load_files

        values = {"device": "cpu", "dtype": "float32", "batch_tokens": 256, **runtime}
        return load_files(open_model(path), options(**values))

    return loaded


@pytest.fixture(scope="session")
def engine(checkpoint: Path, load: Callable[..., TransformersEngine]) -> TransformersEngine:
    return load(checkpoint)


@pytest.fixture(scope="session")
def make_blocks() -> Callable[..., Blocks]:
    """Blocks of random tokens: `make_blocks(n, seq_len, seed=0, share=0.4, vocab=300)`."""

    def made(n: int, seq_len: int, seed: int = 0, share: float = 0.4, vocab: int = 300) -> Blocks:
        rng = np.random.default_rng([seed, n, seq_len])
        scored = rng.random((n, seq_len)) < share
        scored[0, -1] = True
        scored[:, 0] = False
        return Blocks(
            pack="p",
            seq_len=seq_len,
            ids_BS=rng.integers(0, vocab, (n, seq_len)).astype(np.int32),
            scored_BS=scored,
            row_BS=rng.integers(0, 5, (n, seq_len)).astype(np.int32),
            row_packs=np.array([0, 1, 0, 1, 1], np.int32),
            packs=("a", "b"),
            rows_digest="0" * 64,
        )

    return made
