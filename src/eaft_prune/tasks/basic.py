"""Tasks that are the arrow, parts of it, or checks of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from eaft_prune.checks.io_probe import io_probe
from eaft_prune.config import resolve_path
from eaft_prune.core.types import UNION, Checkpoint, KeepPlan, Outcome
from eaft_prune.pipeline.arrow import (
    check_keep_n,
    export_plan,
    judge,
    masked_model,
    measure,
    open_base,
    select,
    write,
)
from eaft_prune.pipeline.sequential import Side, measure_all
from eaft_prune.pipeline.session import Bench
from eaft_prune.records.evaluation import load_evaluation
from eaft_prune.stages import export
from eaft_prune.stages.pack import BlockRequest


def run_pipeline(bench: Bench, out: Path) -> Outcome:
    """Prune and prove: everything from packs to verdict."""
    base = open_base(bench)
    check_keep_n(bench, base)
    if bench.experiment.export.path and "pruned" in bench.experiment.eval.candidates:
        export.check_target(resolve_path(bench.experiment.export.path))
    selection = select(bench, base)
    sides = [Side("base", base)]
    pruned: Checkpoint | None = None
    for name in bench.experiment.eval.candidates:
        if name == "masked":
            model, label = masked_model(bench, base)
            sides.append(Side(label, model, selection.plan))
        else:
            model = write(bench, base, selection)
            pruned = model.checkpoint
            sides.append(Side(name, model))
    first, *rest = measure_all(bench, base, sides)
    return judge(bench, out, first, rest, selection, base.checkpoint, pruned)


def run_profile(bench: Bench, out: Path) -> Outcome:
    """Trace, scores and plan; no evaluation."""
    base = bench.base()
    check_keep_n(bench, base)
    return Outcome(selection=select(bench, base), base=base.checkpoint)


def run_prune(bench: Bench, out: Path) -> Outcome:
    """From packs to the checkpoint on disk; no evaluation."""
    base = bench.base()
    check_keep_n(bench, base)
    if bench.experiment.export.path:
        export.check_target(resolve_path(bench.experiment.export.path))
    selection = select(bench, base)
    pruned = write(bench, base, selection)
    return Outcome(selection=selection, base=base.checkpoint, checkpoint=pruned.checkpoint)


def run_predownload(bench: Bench, out: Path) -> Outcome:
    """Fetch model and packs where they come from a hub; check tensors and rows, hash everything."""
    base = bench.base()
    files = base.files
    facts = {
        "base": str(files.path),
        "base_digest": base.digest,
        "tensors": len(files.tensors),
        "weight_bytes": files.weight_bytes,
        "packs": {name: str(path) for name, (path, _) in bench.pack_files().items()},
    }
    return Outcome(base=base.checkpoint, facts=facts)


def run_evaluate(bench: Bench, out: Path) -> Outcome:
    """One model against nothing: its own metrics, saved for a later comparison."""
    base = open_base(bench)
    evaluation = measure(bench, base, "base", base)
    return judge(bench, out, evaluation, [], None, base.checkpoint, None)


def run_compare(bench: Bench, out: Path) -> Outcome:
    """Two saved evaluations: table and gate, no model."""
    paths = bench.experiment.compare
    assert paths is not None, "config requires compare.* for this task"
    base = replace(load_evaluation(resolve_path(paths.base)), model="base")
    candidate = replace(load_evaluation(resolve_path(paths.candidate)), model="pruned")
    return judge(bench, out, base, [candidate], None, None, None)


def run_noise_floor(bench: Bench, out: Path) -> Outcome:
    """The base model evaluated twice: what the gate reads when nothing changed."""
    base = open_base(bench)
    sides = [Side("base", base), Side("repeat", base, replicate=1)]
    first, second = measure_all(bench, base, sides)
    return judge(bench, out, first, [second], None, base.checkpoint, None)


def run_noop(bench: Bench, out: Path) -> Outcome:
    """Rewrite with every expert kept: bytes must be equal and the gate must pass."""
    base = open_base(bench)
    config = base.files.config
    n_experts, n_layers = base.family.n_experts(config), base.family.n_layers(config)
    plan = KeepPlan((tuple(range(n_experts)),) * n_layers, n_experts)
    bench.observer.plan(plan)
    model = export_plan(bench, base, plan, {"criterion": "keep all"})
    same = export.identical_tensors(base.files, model.files)
    first, second = measure_all(bench, base, [Side("base", base), Side("pruned", model)])
    facts = {"identical_tensors": same}
    return judge(bench, out, first, [second], None, base.checkpoint, model.checkpoint, facts)


def run_expert_math(bench: Bench, out: Path) -> Outcome:
    """Our experts against transformers' eager loop and against float64, layer by layer."""
    from eaft_prune.checks.expert_math import expert_math  # torch: not before settings are checked

    base = bench.base()
    settings = bench.experiment.profile
    request = BlockRequest(UNION, "profile", settings.seq_len, 1, settings.seed)
    blocks = bench.blocks(base, request).value
    facts = expert_math(bench.local_engine(base), blocks)
    return Outcome(base=base.checkpoint, facts=facts)


def run_io_probe(bench: Bench, out: Path) -> Outcome:
    """One layer written as an export would: bytes, seconds, memory, and an estimate for all."""
    base = bench.base()
    check_keep_n(bench, base)
    settings = bench.experiment
    total = base.files.weight_bytes // base.family.n_layers(base.files.config)
    with bench.bars.bar("io probe", total, "B") as on_bytes:
        facts = io_probe(
            base.family,
            base.files,
            settings.pruning.keep_n,
            settings.probe.layer,
            resolve_path(settings.runtime.checkpoint_dir),
            settings.export.max_shard_bytes,
            on_bytes,
        )
    return Outcome(base=base.checkpoint, facts=facts)
