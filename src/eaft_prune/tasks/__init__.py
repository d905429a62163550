"""Every task by its name: tracked ones of (bench, output directory), upkeep of the settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from eaft_prune.config import Experiment
from eaft_prune.core.progress import Bars
from eaft_prune.core.types import Outcome
from eaft_prune.pipeline.session import Bench
from eaft_prune.search import run_search
from eaft_prune.tasks import basic
from eaft_prune.tasks.ablate import run_ablate
from eaft_prune.tasks.decode_bench import run_decode_bench
from eaft_prune.tasks.engine_parity import run_engine_parity
from eaft_prune.tasks.memo import run_memo
from eaft_prune.tasks.plan import run_plan
from eaft_prune.tasks.replay import run_replay
from eaft_prune.tasks.stability import run_stability
from eaft_prune.tasks.upkeep import Upkeep, run_doctor, run_gc
from eaft_prune.tasks.usage import run_usage
from eaft_prune.tasks.verify import run_verify

TASKS: Mapping[str, Callable[[Bench, Path], Outcome]] = {
    "pipeline": basic.run_pipeline,
    "predownload": basic.run_predownload,
    "profile": basic.run_profile,
    "prune": basic.run_prune,
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
    "engine_parity": run_engine_parity,
    "decode_bench": run_decode_bench,
    "usage": run_usage,
    "ablate": run_ablate,
    "stability": run_stability,
    "memo": run_memo,
}

UPKEEP: Mapping[str, Callable[[Experiment, Bars], Upkeep]] = {
    "doctor": run_doctor,
    "gc": run_gc,
}
