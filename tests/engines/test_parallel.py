"""Several processes score what one would, to the last bit."""

from __future__ import annotations

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
pytestmark = [pytest.mark.process, pytest.mark.dear]


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


def ranks(cwd: Path, *commands: list[str]) -> list[subprocess.Popen[str]]:
    """The processes of one run, as torchrun's agents on as many nodes would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "none"}
    common |= {"WORLD_SIZE": str(len(commands)), "LOCAL_RANK": "0", "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, "-u", *command],
            cwd=cwd,
            env={**os.environ, **common, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, command in enumerate(commands)
    ]


@pytest.mark.slow
def test_a_helper_that_is_killed_is_named_in_one_line(world: World, tmp_path: Path) -> None:
    here = world.elsewhere(tmp_path)
    cwd = fresh_directory(tmp_path)
    first, helper = ranks(cwd, *[["-m", "eaft_prune", *here.arguments]] * 2)
    assert first.stdout is not None
    said = next(line for line in first.stdout if line.startswith("profile "))
    helper.kill()
    out, err = first.communicate()
    helper.communicate()
    (line,) = err.strip().splitlines()
    assert line.startswith("error: rank 1 of 2 is gone"), said + out + err
    assert first.returncode == 1
    result = Done(1, out, err, cwd).result
    assert result["status"] == "FAILED"
    assert f"error: {result['error']}" == line


def test_helpers_end_with_rank_0(tmp_path: Path) -> None:
    """What comes after the meeting is a broadcast that never is."""
    meet = "import os; from eaft_prune.engines import parallel; parallel.join(); "
    ends = [["-c", f"{meet}os.kill(os.getpid(), 9)"], ["-c", f"{meet}parallel.serve(None)"]]
    processes = ranks(tmp_path, *ends, ends[1])
    processes[0].communicate()
    for rank, helper in enumerate(processes[1:], 1):
        _, err = helper.communicate()
        what = "rank 0 is gone: its process or host ended"
        assert err.strip() == f"error: {what}, rank {rank} ends too"
        assert helper.returncode == 1
