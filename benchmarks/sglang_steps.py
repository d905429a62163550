"""Steps of sglang_gpu.py, which run against a deadline, and those that measure decoding."""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from eaft_prune.checks.decoding_speed import Point, ladder, max_stable_batch, summary
from eaft_prune.engines.decoding import HttpDecoder, Prompts
from eaft_prune.engines.sglang.server import Server

PROMPT, REPEATS = 256, 2
SHORT, BATCHES = 256, (1, 8, 64)
LONG, LONGEST, LONGEST_BATCHES = 2048, 8192, (1, 16)


class Steps:
    """Runs steps against a deadline and keeps what they found."""

    def __init__(self, out: Path, seconds: float) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.out, self.started, self.seconds = out, time.monotonic(), seconds
        self.found: dict[str, Any] = {"seconds": {}}

    @property
    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.started)

    def require(self, seconds: float) -> None:
        """Raise TimeoutError, within a step, unless so much time is left."""
        if self.left < seconds:
            raise TimeoutError(f"needs {seconds:.0f} s")

    @contextmanager
    def step(self, name: str) -> Iterator[dict[str, Any]]:
        """Facts of a step; what goes wrong in it is printed and written, and does not go on."""
        begin, facts = time.monotonic(), dict[str, Any]()
        print(f"--- {name} ({self.left:.0f} s left)")
        try:
            yield facts
        except Exception as error:
            traceback.print_exc(limit=4, file=sys.stdout)
            facts["error"] = f"{type(error).__name__}: {error}"[:4000]
        seconds = time.monotonic() - begin
        print(f"    {name}: {seconds:.1f} s")
        self.found["seconds"][name] = round(seconds, 1)
        self.found[name] = facts
        (self.out / "sglang_gpu.json").write_text(json.dumps(self.found, indent=1) + "\n")


def decode(steps: Steps, servers: dict[str, Future[Server]], shrink: int) -> None:
    """Base and candidates in turn, the order turning every round."""
    up: dict[str, HttpDecoder] = {}
    for name, future in servers.items():
        with steps.step(f"20b {name} is up") as facts:
            server = future.result(timeout=max(steps.left - 40, 1))
            facts |= {"memory_gb": server.memory_gb, "capacity": server.capacity}
            facts["args"] = dict(server.args)
            up[name] = HttpDecoder(server.client, "sglang", {}, server.capacity)
            few = min(48, SHORT // shrink)
            list(ladder(up[name], name, BATCHES, few, 0, prompts(99)))  # warm-up
    ends = [name for name in up if name in ("base", "keep16")]
    for names, new_tokens, batches, repeats, needs in (
        (list(up), SHORT, BATCHES, range(REPEATS), 10),
        (list(up), LONG, BATCHES, range(1), 45),
        (ends, LONGEST, LONGEST_BATCHES, range(1), 100),
        (ends, LONG, BATCHES, range(1, 2), 45),
    ):
        some = {name: up[name] for name in names}
        rounds(steps, some, new_tokens // shrink, batches, repeats, needs / shrink)
    for future in servers.values():
        if future.done() and future.exception() is None:
            stop(future.result())


def rounds(
    steps: Steps, up: dict[str, HttpDecoder], new_tokens: int, batches: tuple[int, ...],
    repeats: range, needs: float,
) -> None:  # fmt: skip
    """Each server in turn, as long as there is time; medians after."""
    points: list[Point] = []
    for repeat in repeats:
        for name in list(up) if repeat % 2 == 0 else reversed(up):
            with steps.step(f"decode {name}, {new_tokens} new, round {repeat}") as facts:
                steps.require(needs)
                collect(facts, points, up[name], name, batches, new_tokens, repeat)
    report(steps, f"decode {new_tokens} new, rounds {repeats}", points, len(repeats))


def collect(
    facts: dict[str, Any], points: list[Point], decoder: HttpDecoder, side: str,
    batches: tuple[int, ...], new_tokens: int, repeat: int,
) -> None:  # fmt: skip
    for item in ladder(decoder, side, batches, new_tokens, repeat, prompts(repeat)):
        if isinstance(item, Point):
            points.append(item)
        else:
            facts["ended"] = item
            print(f"    {item}")


def prompts(seed: int) -> Callable[[int], Prompts]:
    def make(batch: int) -> Prompts:
        rng = np.random.default_rng([seed, batch])
        found: list[list[int]] = rng.integers(0, 200_000, (batch, PROMPT)).tolist()
        return found

    return make


def report(steps: Steps, name: str, points: list[Point], repeats: int) -> None:
    with steps.step(f"{name}, medians") as facts:
        rows = summary(points)
        facts |= {"rows": [asdict(row) for row in rows], "points": [asdict(p) for p in points]}
        facts["max_stable_batch"] = max_stable_batch(rows, repeats)
        for row in rows:
            print(
                f"    {row.side:<8} new {row.new_tokens:<5} batch {row.batch:<3} "
                f"{row.total_tokens_s:>9.1f} tok/s  {row.stream_tokens_s:>7.1f} a stream  "
                f"first token {row.ttft_s * 1000:.0f} ms  x base {row.ratio or 0:.3f}"
            )


def stop(server: Server) -> None:
    assert server.process is not None, "it was launched"
    server.process.stop()
