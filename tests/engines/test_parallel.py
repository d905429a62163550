"""Several processes score what one would, to the last bit."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.runs import Done, World, fresh_directory, process

from eaft_prune.engines.parallel import deal

pytest_plugins = ("support.worlds",)
pytestmark = pytest.mark.process


@given(blocks=st.integers(1, 300), batch=st.integers(1, 40), ranks=st.integers(1, 9))
def test_blocks_are_dealt_once_each_in_whole_batches(blocks: int, batch: int, ranks: int) -> None:
    shares = [list(range(blocks))[part] for part in deal(blocks, batch, ranks)]
    assert [block for share in shares for block in share] == list(range(blocks))
    mine = [share[i : i + batch] for share in shares for i in range(0, len(share), batch)]
    assert mine == [list(range(blocks))[i : i + batch] for i in range(0, blocks, batch)]
    counts = [len(share[::batch]) for share in shares]
    assert max(counts) - min(counts) <= 1


@pytest.mark.slow
def test_two_processes_find_what_one_does(world: World, tmp_path: Path) -> None:
    """Masked and written candidates, profile included, through torchrun and the command line."""
    here = world.elsewhere(tmp_path / "one")
    extra = ["eval.candidates=[masked,pruned]", "runtime.batch_tokens=128", "eval.generation=true"]
    extra += ["generation.prompts=2", "generation.max_new_tokens=4"]
    alone = here.run(*extra)
    assert alone.code == 0, alone.out + alone.err
    there = world.elsewhere(tmp_path / "two")
    cwd = fresh_directory(there.home)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [sys.executable, *torchrun, "-m", "eaft_prune", *there.arguments, *extra],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    together = Done(done.returncode, done.stdout, done.stderr, cwd)
    assert together.code == 0, together.out + together.err
    assert together.result["digests"] == alone.result["digests"]
    assert together.result["reports"] == alone.result["reports"]
    cached = {stage["stage"] for stage in together.result["stages"] if stage["cached"]}
    assert cached <= {"passages/pruned/UNION"}  # of equal scores, as the masked ones are


def test_no_thread_outlives_the_group(tmp_path: Path) -> None:
    """One that does is ended by force with Python itself, which now and then aborts."""
    code = """
from pathlib import Path
from eaft_prune.engines import parallel

parallel.join()
import transformers.modeling_utils

parallel.stop()
names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
assert not [name for name in names if "gloo" in name], names
"""
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    done = process([], tmp_path, code=code, **alone)
    assert done.code == 0, done.err


def test_helpers_end_when_the_command_line_is_refused(tmp_path: Path) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [sys.executable, *torchrun, "-m", "eaft_prune", "pruning.keep_n=30"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert done.stderr.count("pruning.keep_n = 30 is not a multiple") == 1


def ranks(world: World, home: Path) -> tuple[subprocess.Popen[str], subprocess.Popen[str]]:
    """Two processes of one run, as torchrun's agents on two nodes would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    cwd = fresh_directory(home)
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    common |= {"TORCHELASTIC_RUN_ID": "none", "OMP_NUM_THREADS": "1"}
    one, other = (
        subprocess.Popen(
            [sys.executable, "-u", "-m", "eaft_prune", *world.arguments],
            cwd=cwd,
            env={**os.environ, **common, "RANK": rank, "LOCAL_RANK": "0"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    )
    return one, other


@pytest.mark.slow
@pytest.mark.parametrize("dies", [0, 1])
def test_the_rank_that_is_killed_is_named_in_one_line(
    world: World, tmp_path: Path, dies: int
) -> None:
    """And the other ends, truthfully where it is the one that records."""
    both = ranks(world.elsewhere(tmp_path), tmp_path)
    assert both[0].stdout is not None
    said = next(line for line in both[0].stdout if line.startswith("profile "))
    both[dies].kill()
    left = both[1 - dies]
    out, err = left.communicate(timeout=120)
    both[dies].communicate()
    (line,) = err.strip().splitlines()
    assert line.startswith(f"error: rank {dies}"), said + out + err
    assert left.returncode == 1
    results = [json.loads(path.read_text()) for path in tmp_path.rglob("result.json")]
    assert [result["status"] for result in results] == ["FAILED"] * dies
    assert [result["error"] for result in results] == [line.removeprefix("error: ")] * dies
