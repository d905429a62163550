"""How a multirun's jobs ended: from what is left on disk, the queue's word, and live processes."""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eaft_prune.cli import endings
from eaft_prune.core.provenance import process_tags

# sacct's and squeue's own lists of states, by their manuals
ENDED = ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY")
ENDED += ("PREEMPTED", "TIMEOUT", "REVOKED")
THERE = ("PENDING", "RUNNING", "SUSPENDED", "CONFIGURING", "REQUEUED", "STAGE_OUT", "A_NEW_ONE", "")
RESULTS = (None, "FINISHED", "FAILED", "KILLED")


def left(out: Path, status: str | None, state: str | None) -> endings.Found:
    """What is found after one job with this result.json and this state in the queue."""
    if status:
        value = {"job": 0, "status": status, "error": None if status == "FINISHED" else "why"}
        (out / "0").mkdir(exist_ok=True)
        (out / "0" / "result.json").write_text(json.dumps(value))
    if state is not None:
        endings.write_queue(out, {0: endings.Queued("7_0", state, "log")})
    return endings.found(out, {})


@given(st.sampled_from(RESULTS), st.sampled_from(ENDED + THERE), st.booleans())
def test_a_point_is_still_running_while_its_queue_has_it(
    status: str | None, state: str, stopped: bool
) -> None:
    with tempfile.TemporaryDirectory() as home:
        found, why = left(Path(home), status, state).ending(0, stopped)
    assert (found == "FINISHED") == (status == "FINISHED")
    assert found in ("FINISHED", "FAILED", "CANCELLED", "LOST", "STILL RUNNING")
    if state in THERE and status in (None, "KILLED"):
        assert found == "STILL RUNNING"
    if found == "STILL RUNNING":
        assert state in THERE
    if found == "FAILED":
        assert status == "FAILED" or state in ENDED
    assert (why == "") == (found == "FINISHED")


@pytest.mark.process
def test_without_a_queue_the_process_that_began_decides(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "600"]) as other:
        started = f"{psutil.Process(other.pid).create_time():.2f}"
        tags = process_tags() | {"process.pid": str(other.pid), "process.started": started}
        (tmp_path / "0").mkdir()
        mark = json.dumps({"job": 0, "process": tags})
        (tmp_path / "0" / "began.json").write_text(mark)
        status, why = endings.found(tmp_path, {}).ending(0, stopped=False)
        assert status == "STILL RUNNING"
        assert f"process {other.pid} on " in why
        other.kill()
    assert endings.found(tmp_path, {}).ending(0, stopped=False)[0] == "LOST"
    assert endings.found(tmp_path, {}).ending(0, stopped=True)[0] == "CANCELLED"
    endings.write_began(tmp_path / "0", 0)  # one that ran in this very process
    assert endings.found(tmp_path, {}).ending(0, stopped=False)[0] == "LOST"
    assert endings.found(tmp_path, {}).ending(1, stopped=True) == (
        "CANCELLED",
        "not run: the multirun was stopped",
    )
