"""The arrow on one screen: pack -> profile -> score -> plan -> export -> evaluate -> gate."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from eaft_prune.bench import Bench, Model
from eaft_prune.config import resolve_path
from eaft_prune.evaluations import compare, load_evaluation, save_evaluation
from eaft_prune.fingerprint import digest
from eaft_prune.stages import evaluate, export, profile
from eaft_prune.stages import plan as planning
from eaft_prune.stages import score as scoring
from eaft_prune.stages.pack import BlockRequest
from eaft_prune.store import Stored
from eaft_prune.types import (
    UNION,
    Checkpoint,
    Comparison,
    EvalKey,
    Evaluation,
    ExpertScores,
    KeepPlan,
    Selection,
    StageRecord,
    TokenScores,
    Trace,
    UserError,
)


@dataclass(frozen=True)
class Outcome:
    """What a task found; the parts it did not make are None."""

    comparison: Comparison | None = None
    selection: Selection | None = None
    base: Checkpoint | None = None
    checkpoint: Checkpoint | None = None
    evaluations: Mapping[str, Path] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


def run_pipeline(bench: Bench, out: Path) -> Outcome:
    """Prune and prove: everything from packs to verdict."""
    base = _open(bench)
    _check_keep_n(bench, base)
    if bench.experiment.export.path and "pruned" in bench.experiment.eval.candidates:
        export.check_target(resolve_path(bench.experiment.export.path))
    selection = select(bench, base)
    measured_base = measure(bench, base, "base", base)
    candidates = []
    pruned: Checkpoint | None = None
    for name in bench.experiment.eval.candidates:
        if name == "masked":
            candidates.append(measure(bench, base, name, base, mask=selection.plan))
        else:
            model = write(bench, base, selection)
            pruned = model.checkpoint
            candidates.append(measure(bench, model, name, base))
    return judge(bench, out, measured_base, candidates, selection, base.checkpoint, pruned)


def run_profile(bench: Bench, out: Path) -> Outcome:
    """Trace, scores and plan; no evaluation."""
    base = bench.base()
    _check_keep_n(bench, base)
    return Outcome(selection=select(bench, base), base=base.checkpoint)


def run_evaluate(bench: Bench, out: Path) -> Outcome:
    """One model against nothing: its own metrics, saved for a later comparison."""
    base = _open(bench)
    evaluation = measure(bench, base, "base", base)
    return judge(bench, out, evaluation, [], None, base.checkpoint, None)


def run_compare(bench: Bench, out: Path) -> Outcome:
    """Two saved evaluations: table and gate, no model."""
    paths = bench.experiment.compare
    assert paths is not None, "config.py requires compare.* for this task"
    base = replace(load_evaluation(resolve_path(paths.base)), model="base")
    candidate = replace(load_evaluation(resolve_path(paths.candidate)), model="pruned")
    return judge(bench, out, base, [candidate], None, None, None)


def run_noise_floor(bench: Bench, out: Path) -> Outcome:
    """The base model evaluated twice: what the gate reads when nothing changed."""
    base = _open(bench)
    first = measure(bench, base, "base", base)
    second = measure(bench, base, "repeat", base, replicate=1)
    return judge(bench, out, first, [second], None, base.checkpoint, None)


def run_noop(bench: Bench, out: Path) -> Outcome:
    """Rewrite with every expert kept: bytes must be equal and the gate must pass."""
    base = _open(bench)
    config = base.files.config
    n_experts, n_layers = base.family.n_experts(config), base.family.n_layers(config)
    plan = KeepPlan((tuple(range(n_experts)),) * n_layers, n_experts)
    bench.observer.plan(plan)
    model = _export(bench, base, plan, {"criterion": "keep all"})
    same = export.identical_tensors(base.files, model.files)
    first = measure(bench, base, "base", base)
    second = measure(bench, model, "pruned", base)
    facts = {"identical_tensors": same}
    return judge(bench, out, first, [second], None, base.checkpoint, model.checkpoint, facts)


def run_expert_math(bench: Bench, out: Path) -> Outcome:
    """Our experts against transformers' eager loop and against float64, layer by layer."""
    from eaft_prune.stages.expert_math import expert_math  # torch: not before settings are checked

    base = bench.base()
    settings = bench.experiment.profile
    request = BlockRequest(UNION, "profile", settings.seq_len, 1, settings.seed)
    blocks = bench.blocks(base, request).value
    facts = expert_math(bench.engine(base), blocks)
    return Outcome(base=base.checkpoint, facts=facts)


TASKS: Mapping[str, Callable[[Bench, Path], Outcome]] = {
    "pipeline": run_pipeline,
    "profile": run_profile,
    "evaluate": run_evaluate,
    "compare": run_compare,
    "noise_floor": run_noise_floor,
    "noop": run_noop,
    "expert_math": run_expert_math,
}


def select(bench: Bench, base: Model) -> Selection:
    """profile -> score -> plan."""
    trace = trace_of(bench, base)
    settings = bench.experiment.pruning
    scored = settings.model_dump(
        exclude={"name", "keep_n", "keep_multiple", "core_pos_top_m", "core_count_top_m"}
    )
    scores = bench.stage(
        "score",
        scoring.VERSION,
        scored,
        {"trace": trace.digest},
        ExpertScores,
        lambda: scoring.score(settings, trace.value),
        lambda value, seconds: {f"{name}_tokens": n for name, n in value.region_tokens.items()},
    )
    cut = settings.model_dump(include={"keep_n", "core_pos_top_m", "core_count_top_m"})
    plan = bench.stage(
        "plan",
        planning.VERSION,
        cut,
        {"scores": scores.digest},
        KeepPlan,
        lambda: planning.plan(settings, scores.value),
    )
    bench.observer.plan(plan.value)
    return Selection(settings.name, scores.value, plan.value)


def trace_of(bench: Bench, base: Model) -> Stored[Trace]:
    """The routing trace of the profiling blocks."""
    settings = bench.experiment.profile
    blocks = bench.blocks(
        base,
        BlockRequest(UNION, "profile", settings.seq_len, settings.num_blocks, settings.seed),
    )
    tokens = settings.num_blocks * settings.seq_len

    def compute() -> Trace:
        engine = bench.engine(base)
        with bench.bars.bar("profile", tokens, "tok") as on_tokens:
            return profile.profile(engine, blocks.value, on_tokens)

    return bench.stage(
        "profile",
        profile.VERSION,
        numerics(bench),
        {"model": base.digest, "blocks": blocks.digest},
        Trace,
        compute,
        lambda trace, seconds: {
            "tokens": tokens,
            "scored_tokens": len(trace),
            "tokens_per_s": tokens / seconds,
        },
    )


def write(bench: Bench, base: Model, selection: Selection) -> Model:
    """export: the pruned checkpoint on disk, opened and hashed again."""
    how = bench.experiment.pruning.model_dump()
    return _export(bench, base, selection.plan, {"criterion": selection.criterion, "pruning": how})


def measure(
    bench: Bench,
    model: Model,
    label: str,
    base: Model,
    mask: KeepPlan | None = None,
    replicate: int = 0,
) -> Evaluation:
    """evaluate: one model on every asked pack and length."""
    scores: dict[EvalKey, TokenScores] = {}
    token_digests: dict[EvalKey, str] = {}
    for request in requests(bench):
        blocks = bench.blocks(base, request)
        stored = _evaluated(bench, model, label, blocks, request, mask, replicate)
        scores[request.pack, request.seq_len] = stored.value
        token_digests[request.pack, request.seq_len] = blocks.digest
    conditions = {**numerics(bench), "top_k": model.family.top_k(model.files.config)}
    plan_digest = mask.digest if mask else None
    return Evaluation(label, model.digest, plan_digest, scores, token_digests, conditions)


def requests(bench: Bench) -> list[BlockRequest]:
    """The blocks to evaluate, pack by pack at each length."""
    settings = bench.experiment.eval
    return [
        BlockRequest(pack, "eval", seq_len, settings.blocks_of(pack, seq_len), settings.seed)
        for seq_len in settings.seq_lens
        for pack in bench.experiment.eval_packs
    ]


def _evaluated(
    bench: Bench,
    model: Model,
    label: str,
    blocks: Stored[Any],
    request: BlockRequest,
    mask: KeepPlan | None,
    replicate: int,
) -> Stored[TokenScores]:
    tokens = request.num_blocks * request.seq_len
    name = f"evaluate/{label}/{request.pack}/{request.seq_len}"

    def compute() -> TokenScores:
        engine = bench.engine(model)
        with bench.bars.bar(name, tokens, "tok") as on_tokens:
            return evaluate.evaluate(engine, blocks.value, mask, on_tokens)

    return bench.stage(
        name,
        *_evaluation(bench, model.digest, blocks.digest, mask, replicate),
        TokenScores,
        compute,
        lambda value, seconds: {
            "tokens": tokens,
            "scored_tokens": len(value),
            "tokens_per_s": tokens / seconds,
        },
    )


def _evaluation(
    bench: Bench, model: str, blocks: str, mask: KeepPlan | None, replicate: int = 0
) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Version, settings and inputs that make an evaluation's key."""
    kept = mask.digest if mask and not mask.keeps_all else ""
    settings = {**numerics(bench), "replicate": replicate}
    return evaluate.VERSION, settings, {"model": model, "blocks": blocks, "mask": kept}


def preview(bench: Bench) -> tuple[str, dict[str, str]]:
    """The plan's digest, and the evaluations a pipeline run would have to make.

    They are keyed so that equal ones of several runs have equal keys; the base model is profiled if
    no run has done so yet, nothing is evaluated and nothing exported.
    """
    base = bench.base()
    _check_keep_n(bench, base)
    plan = select(bench, base).plan
    target, key = _export_target(bench, base, plan)
    exported = export.exported_digest(target, key)
    missing: dict[str, str] = {}
    for name in ("base", *bench.experiment.eval.candidates):
        mask = plan if name == "masked" else None
        model = exported if name == "pruned" else base.digest
        for request in requests(bench):
            blocks = bench.blocks(base, request).digest
            version, settings, inputs = _evaluation(bench, model or "", blocks, mask)
            if model is None or not bench.store.holds("evaluate", version, settings, inputs):
                what = f"{name} {request.pack} {request.seq_len}"
                missing[digest([inputs, plan.digest if model is None else ""])] = what
    return plan.digest, missing


def _export_target(bench: Bench, base: Model, plan: KeepPlan) -> tuple[Path, str]:
    settings, runtime = bench.experiment.export, bench.experiment.runtime
    name = f"{bench.experiment.model.name}-keep{plan.uniform_keep_n}-{plan.digest[:12]}"
    target = resolve_path(settings.path or str(Path(runtime.checkpoint_dir) / name))
    key = digest(
        {
            "stage": "export",
            "version": export.VERSION,
            "model": base.digest,
            "plan": plan.digest,
            "max_shard_bytes": settings.max_shard_bytes,
        }
    )
    return target, key


def _export(bench: Bench, base: Model, plan: KeepPlan, how: Mapping[str, Any]) -> Model:
    settings = bench.experiment.export
    target, key = _export_target(bench, base, plan)
    provenance = {"base": {"label": bench.experiment.model.name, "digest": base.digest}, **how}
    total = base.files.weight_bytes * len(plan.kept[0]) // plan.n_experts
    with bench.bars.bar("export", total, "B") as on_bytes:
        done = export.export(
            base.family,
            base.files,
            plan,
            target,
            key,
            settings.max_shard_bytes,
            provenance,
            on_bytes,
        )
    bench.record(
        StageRecord(
            "export",
            key,
            done.cached,
            done.seconds,
            done.digest,
            done.path,
            {"bytes": done.bytes_written},
        )
    )
    model = bench.open(done.path, "pruned")
    if model.digest != done.digest:
        raise UserError(f"{done.path} is not what was exported: move it away and run again")
    bench.observer.checkpoint("pruned", model.checkpoint, base.checkpoint)
    return model


def judge(
    bench: Bench,
    out: Path,
    base: Evaluation,
    candidates: list[Evaluation],
    selection: Selection | None,
    base_checkpoint: Checkpoint | None,
    pruned: Checkpoint | None,
    facts: Mapping[str, Any] | None = None,
) -> Outcome:
    comparison = compare(bench.experiment.eval, bench.experiment.gate, base, candidates)
    saved = {}
    for model in (base, *candidates):
        saved[model.model] = out / "evaluations" / model.model
        # of an earlier run in the same hydra.run.dir or hydra.sweep.dir
        shutil.rmtree(saved[model.model], ignore_errors=True)
        save_evaluation(saved[model.model], model)
        reference = None if model is base else comparison.reports[base.model]
        bench.observer.reports(model.model, comparison.reports[model.model], reference)
    for verdict in list(comparison.verdicts.values())[:1]:
        bench.observer.verdict(verdict)
    return Outcome(comparison, selection, base_checkpoint, pruned, saved, facts or {})


def _open(bench: Bench) -> Model:
    """The base, and every block that will be evaluated: what is missing shows at once."""
    base = bench.base()
    for request in requests(bench):
        bench.blocks(base, request)
    return base


def _check_keep_n(bench: Bench, base: Model) -> None:
    config = base.files.config
    planning.check_keep_n(
        bench.experiment.pruning, base.family.n_experts(config), base.family.top_k(config)
    )


def numerics(bench: Bench) -> dict[str, Any]:
    """What the numbers depend on besides weights and tokens."""
    return {
        "engine": bench.experiment.engine.name,
        "dtype": bench.dtype(),
        "entropy_top_k": bench.experiment.eval.entropy_top_k,
    }
