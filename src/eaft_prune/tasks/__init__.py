"""Every task by its name: one function of (bench, output directory) each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from eaft_prune.bench import Bench
from eaft_prune.search import run_search
from eaft_prune.tasks import basic
from eaft_prune.tasks.plan import run_plan
from eaft_prune.tasks.replay import run_replay
from eaft_prune.tasks.verify import run_verify
from eaft_prune.types import Outcome

TASKS: Mapping[str, Callable[[Bench, Path], Outcome]] = {
    "pipeline": basic.run_pipeline,
    "profile": basic.run_profile,
    "evaluate": basic.run_evaluate,
    "compare": basic.run_compare,
    "noise_floor": basic.run_noise_floor,
    "noop": basic.run_noop,
    "expert_math": basic.run_expert_math,
    "io_probe": basic.run_io_probe,
    "search": run_search,
    "plan": run_plan,
    "replay": lambda bench, out: run_replay(bench, out, TASKS),
    "verify": run_verify,
}
