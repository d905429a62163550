"""What a further point of a grid or a search costs on the shipped demo model.

    python benchmarks/sweeps_and_search.py [--blocks 8] [--seq-len 1024] [--profile-blocks 8]
        [--search-blocks 4] [--trials 200] [--cold 2]
        [--parts grid search scoring kill] [--full] [--forked] [-- SETTING=VALUE ...]

Prints: the 25-point weight grid as one multirun, against separate `python -m eaft_prune` runs, each
with its own store (--cold of them are run, all with 25); then a
search, the seconds of its trials whose plan was known, of their scoring alone (on a trace of the
demo's own size), and a search that is killed in the middle. --full keeps the demo's own sizes
instead of the small ones; --forked begins runs as forks of this process, to try this script.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import torch
from runs import session, under
from runs import settings as checked

from eaft_prune.cli.main import main as main_of
from eaft_prune.pipeline.traces import trace_of
from eaft_prune.stages.plan import plan
from eaft_prune.stages.score import score

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from support.forks import Fork, fork

PARTS = ("grid", "search", "scoring", "kill")
GRID = {"w_conflict": (-4, -2, -1, -0.5, 0), "w_uncertain": (0, 0.25, 0.5, 0.75, 1)}


@dataclass(frozen=True)
class Starter:
    """How runs begin: a new Python each, or a fork of this one, which has imported everything."""

    forked: bool

    def begin(self, home: Path, *arguments: str) -> Fork:
        """A command line with everything it leaves under `home`."""
        home.mkdir(parents=True, exist_ok=True)
        given = [*arguments, *under(home)]
        python = [sys.executable, "-u", "-m", "eaft_prune", *given]
        return fork(lambda: main_of(given) if self.forked else os.execv(python[0], python), home)

    def run(self, home: Path, *arguments: str) -> tuple[float, list[dict[str, Any]]]:
        """Seconds, and every finished result.json."""
        begun = self.begin(home, *arguments)
        if begun.wait():
            sys.exit(begun.text)
        seconds = time.monotonic() - begun.started
        found = [
            json.loads(p.read_text())
            for d in ("outputs", "multirun")
            for p in home.glob(f"{d}/**/result.json")
        ]
        return seconds, [value for value in found if value["status"] == "FINISHED"]


def grid(starter: Starter, home: Path, settings: list[str], cold: int) -> tuple[float, float]:
    """Seconds of one multirun, and of as many separate runs."""
    seconds, results = starter.run(home / "grid", "+sweeps=weight_grid", *settings)
    results.sort(key=lambda value: value["job"])
    plans = {value["plan"]["digest"] for value in results}
    ran = sum(
        stage["stage"].startswith("evaluate/") and not stage["cached"]
        for value in results
        for stage in value["stages"]
    )
    print(f"grid: {len(results)} points in one multirun  {seconds:8.1f} s")
    print(f"  distinct plans {len(plans)}, evaluations run {ran} (the base model's included)")
    points = [(c, u) for c in GRID["w_conflict"] for u in GRID["w_uncertain"]]
    times = []
    for number in range(cold):
        job = number * (len(points) - 1) // max(cold - 1, 1)
        weights = [f"pruning.{n}={v}" for n, v in zip(GRID, points[job], strict=True)]
        masked = "eval.candidates=[masked]"
        spent, (alone,) = starter.run(home / f"cold{number}", *weights, masked, *settings)
        times.append(spent)
        same = alone["gate"] == results[job]["gate"] and alone["plan"] == results[job]["plan"]
        print(f"  point {job} alone, empty store {spent:8.1f} s, same plan and verdict: {same}")
    every = statistics.mean(times) * len(points)
    how = "took" if cold == len(points) else f"would take, by the mean of {cold},"
    print(f"  {len(points)} separate runs {how} {every:8.1f} s")
    print(f"  one multirun is {every / seconds:.1f} times as fast")
    return seconds, every


def search(starter: Starter, home: Path, settings: list[str], n_trials: int) -> float:
    """Seconds of the trials alone."""
    where = f"search.storage=sqlite:///{home}/search.db"
    asked = [*settings, "task=search", where, f"search.n_trials={n_trials}"]
    seconds, (result,) = starter.run(home / "search", *asked)
    facts = result["facts"]
    print(f"search: {facts['trials']} trials, whole command  {seconds:8.1f} s")
    print(
        f"  trials alone {facts['search_seconds']} s, distinct plans {facts['distinct_plans']}, "
        f"stopped early {facts['trials_stopped']}, winner's gate {result['gate']['status']}"
    )
    seen: set[str] = set()
    known, between = [], []
    trials = optuna.load_study(study_name=facts["study"], storage=f"sqlite:///{home}/search.db")
    for trial, following in zip(trials.trials, [*trials.trials[1:], None], strict=True):
        digest = trial.user_attrs["plan"]
        if digest in seen and trial.duration:
            known.append(trial.duration.total_seconds())
            if following is not None:
                gap = following.datetime_start - trial.datetime_start
                between.append(gap.total_seconds())
        seen.add(digest)
    if known:
        print(
            f"  {len(known)} trials whose plan was known: median {statistics.median(known):.3f} s "
            f"in the trial, {statistics.median(between):.3f} s from one start to the next"
        )
    return float(facts["search_seconds"])


def scoring(home: Path, settings: list[str]) -> float:
    """Seconds a trial whose plan is known computes: scores over the whole trace, and a plan."""
    experiment = checked([*settings, "runtime.progress=false"])
    bench = session(experiment, home / "scoring")
    trace = trace_of(bench, bench.base()).value
    times = []
    for quantile in range(5, 25):
        pruning = experiment.pruning.model_copy(update={"quantile": quantile / 100})
        started = time.perf_counter()
        plan(pruning, score(pruning, trace))
        times.append(time.perf_counter() - started)
    median = statistics.median(times)
    print(f"score and plan on a trace of {len(trace)} tokens: median {1e3 * median:.1f} ms")
    return median


def kill(starter: Starter, home: Path, settings: list[str], n_trials: int) -> tuple[int, int]:
    """kill -9 after a third of the trials, then the same command again: trials kept, and in all."""
    where = f"search.storage=sqlite:///{home}/killed.db"
    asked = [*settings, "task=search", where, f"search.n_trials={n_trials}"]
    begun = starter.begin(home / "killed", *asked)
    begun.until(f"trial {n_trials // 3} ")
    begun.kill()
    storage = f"sqlite:///{home}/killed.db"
    (name,) = optuna.get_all_study_names(storage)
    before = optuna.load_study(study_name=name, storage=storage).trials
    finished = sum(t.state.name in ("COMPLETE", "PRUNED") for t in before)
    seconds, (result,) = starter.run(home / "killed", *asked)
    facts = result["facts"]
    print(f"kill -9 at trial {n_trials // 3} of {n_trials}: {finished} of {len(before)} kept")
    print(
        f"  the same command again ran {facts['trials_now']}, study holds {facts['trials']}, "
        f"{seconds:.1f} s"
    )
    return finished, facts["trials"]


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """What each part returns, by its name."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--profile-blocks", type=int, default=8)
    parser.add_argument("--search-blocks", type=int, default=4)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--killed-trials", type=int, default=12)
    parser.add_argument("--cold", type=int, default=2)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--full", action="store_true")
    parser.add_argument("settings", nargs="*")
    parser.add_argument("--forked", action="store_true", help="to try this script")
    options = parser.parse_args(arguments)
    starter = Starter(options.forked)
    settings = [] if options.full else [
        f"eval.num_blocks={options.blocks}", f"eval.seq_lens=[{options.seq_len}]",
        "eval.packs=[UNION]", f"gate.seq_lens=[{options.seq_len}]",
        f"profile.num_blocks={options.profile_blocks}", f"profile.seq_len={options.seq_len}",
    ]  # fmt: skip
    sized = [] if options.full else [
        f"search.seq_len={options.seq_len}", f"search.num_blocks={options.search_blocks}",
        "search.chunk_blocks=1",
    ]  # fmt: skip
    asked = sys.argv[1:] if arguments is None else arguments
    print("python benchmarks/sweeps_and_search.py", shlex.join(asked))
    print(f"{os.cpu_count()} CPUs, {torch.get_num_threads()} torch threads, load {os.getloadavg()}")
    print("settings:", " ".join(settings) or "the demo's own")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        searched = [*settings, *sized, *options.settings]
        works: dict[str, Callable[[], object]] = {
            "grid": lambda: grid(starter, home, [*settings, *options.settings], options.cold),
            "search": lambda: search(starter, home, searched, options.trials),
            "scoring": lambda: scoring(home, options.settings),
            "kill": lambda: kill(starter, home, searched, options.killed_trials),
        }
        return {part: works[part]() for part in PARTS if part in options.parts}


if __name__ == "__main__":
    main()
