"""Every task by its name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from eaft_prune.config import Experiment, parse_experiment
from eaft_prune.config.base import allowed
from eaft_prune.core.types import UserError
from eaft_prune.pipeline.arrow import run_arrow
from eaft_prune.search import check_search, run_search
from eaft_prune.tasks import basic, controls, rules
from eaft_prune.tasks.ablate import run_ablate
from eaft_prune.tasks.candidate import run_candidate
from eaft_prune.tasks.decode_bench import run_decode_bench
from eaft_prune.tasks.engine_parity import run_engine_parity
from eaft_prune.tasks.frontier import check_frontier, foretell_frontier, run_frontier
from eaft_prune.tasks.gguf import run_gguf
from eaft_prune.tasks.memo import run_memo
from eaft_prune.tasks.plan import run_plan
from eaft_prune.tasks.publish import run_publish
from eaft_prune.tasks.replay import run_replay
from eaft_prune.tasks.stability import run_stability
from eaft_prune.tasks.task import Task
from eaft_prune.tasks.upkeep import run_doctor, run_gc
from eaft_prune.tasks.usage import check_usage, run_usage
from eaft_prune.tasks.verify import run_verify

_OWN = "the {0} settings: select it as task={0}"


def _with_section(name: str) -> dict[str, Any]:
    return {"settings": (name,), "needs": _OWN.format(name)}


_ALL = (
    Task(
        "pipeline",
        "Prune and prove: profile, plan, checkpoint, base and candidates evaluated, gate.",
        run_arrow,
        evaluates="candidates",
    ),
    Task("profile", "Trace, scores and plan; nothing is evaluated.", basic.run_profile),
    Task(
        "prune", "From packs to the checkpoint; nothing is evaluated.", basic.run_prune, writes=True
    ),
    Task(
        "evaluate",
        "One model's own metrics, saved for a later comparison.",
        basic.run_evaluate,
        evaluates="model",
    ),
    Task(
        "compare",
        "Table and gate for two saved evaluations; loads no model.",
        basic.run_compare,
        settings=("compare",),
        needs="compare.base=DIR and compare.candidate=DIR",
        reads=(),
    ),
    Task(
        "plan",
        "A keep plan from a scores file alone; no model, no packs.",
        run_plan,
        settings=("scores",),
        needs="scores=FILE, the reap-scores.yaml of a checkpoint",
        utility=True,
        reads=(),
    ),
    Task(
        "search",
        "Optuna over pruning settings; the winner is exported and gated on unseen rows.",
        run_search,
        **_with_section("search"),
        writes=True,
        evaluates="plans",
        reweighs=True,
        check=check_search,
    ),
    Task(
        "frontier",
        "How far it can be pruned and still pass: sizes searched, the smallest proven.",
        run_frontier,
        **_with_section("frontier"),
        writes=True,
        evaluates="checkpoints",
        check=check_frontier,
        foretell=foretell_frontier,
    ),
    Task(
        "candidate",
        "A checkpoint or plan made elsewhere against its base, by the same proof.",
        run_candidate,
        settings=("candidate",),
        needs="candidate.path=DIR or candidate.plan=FILE: select it as task=candidate",
        evaluates="checkpoints",
    ),
    Task(
        "ablate",
        "Which term of the weighting does the work: one plan a term, evaluated masked.",
        run_ablate,
        **_with_section("ablate"),
        evaluates="plans",
        reweighs=True,
    ),
    Task(
        "stability",
        "How much the keep plan depends on which rows were profiled.",
        run_stability,
        **_with_section("stability"),
        reweighs=True,
    ),
    Task(
        "noise_floor",
        "The base evaluated twice: what the gate reads when nothing changed.",
        controls.run_noise_floor,
        evaluates="control",
    ),
    Task(
        "noop",
        "A checkpoint with every expert kept: its bytes are the base's and the gate passes.",
        controls.run_noop,
        writes=True,
        evaluates="control",
    ),
    Task(
        "verify",
        "An exported checkpoint against its manifest and its base, byte by byte; offline.",
        run_verify,
        settings=("verify",),
        needs="verify.path=DIR, an exported checkpoint",
        utility=True,
        reads=(),
    ),
    Task(
        "replay",
        "A locked run once more, and every field that differs from its lock.",
        lambda session, out: run_replay(session, out, TASKS, validated),
        settings=("replay",),
        needs="replay.lock=FILE, the run.lock.yaml of a run",
        locked=False,  # its lock is that of the run it repeats
        reads=(),
    ),
    Task(
        "expert_math",
        "Our experts against transformers' loop and against float64, layer by layer.",
        controls.run_expert_math,
        utility=True,
    ),
    Task(
        "engine_parity",
        "The same blocks through transformers and through a server.",
        run_engine_parity,
        evaluates="model",
        engines=("sglang", "vllm", "llamacpp"),
        utility=True,
    ),
    Task(
        "gguf",
        "A checkpoint for llama.cpp, by its own converter; loaded there, ten tokens compared.",
        run_gguf,
        engines=("llamacpp",),
        utility=True,
        reads=("model",),
    ),
    Task(
        "decode_bench",
        "Decoding speed of base and candidate in turn; no quality is measured.",
        run_decode_bench,
        **_with_section("decode_bench"),
        utility=True,
        reads=("model",),
    ),
    Task(
        "io_probe",
        "One layer written as an export would: bytes, seconds, memory.",
        controls.run_io_probe,
        utility=True,
        reads=("model",),
    ),
    Task(
        "usage",
        "The frequency criterion's scores from a server, without a routing trace.",
        run_usage,
        engines=("sglang",),
        check=check_usage,
        utility=True,
    ),
    Task(
        "predownload", "Fetch, check and hash model and packs.", basic.run_predownload, utility=True
    ),
    Task(
        "publish",
        "A judged checkpoint to the hub, with the evidence of its run; refuses what failed.",
        run_publish,
        settings=("publish",),
        needs="publish.repo=OWNER/NAME and publish.run=DIR: select it as task=publish",
        locked=False,
        utility=True,
        reads=(),
    ),
    Task(
        "memo",
        "The decision memo, from the runs MLflow keeps.",
        lambda session, out: run_memo(session, out, TASKS),
        **_with_section("memo"),
        locked=False,
        utility=True,
        reads=(),
    ),
    Task(
        "doctor",
        "Is everything in order, and if not: the command that mends it.",
        run_doctor,
        **_with_section("doctor"),
        tracked=False,
        reads=(),
    ),
    Task(
        "gc",
        "Remove stage outputs and checkpoints that no run, alias or lockfile needs.",
        run_gc,
        **_with_section("gc"),
        tracked=False,
        reads=(),
    ),
)
TASKS: Mapping[str, Task] = {task.name: task for task in _ALL}


def task_of(experiment: Experiment) -> Task:
    """The task that the settings name; raises UserError where there is none."""
    name = experiment.task.name
    if name not in TASKS:
        raise UserError(f"task.name = {name!r}; {allowed(name, list(TASKS))}")
    return TASKS[name]


def validated(values: Mapping[str, Any]) -> Experiment:
    """Composed settings, checked by themselves and for their task; raises UserError."""
    experiment = parse_experiment(values)
    rules.check(task_of(experiment), experiment)
    return experiment
