"""The arrow on one screen: pack -> profile -> score -> plan -> export -> evaluate -> gate."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eaft_prune.checkpoints.pad import router_bias
from eaft_prune.config import PLAN_SETTINGS, resolve_path
from eaft_prune.core.digests import digest
from eaft_prune.core.store import Stored
from eaft_prune.core.types import (
    UNION,
    Checkpoint,
    EvalKey,
    Evaluation,
    ExpertScores,
    KeepPlan,
    LayerLosses,
    Outcome,
    Selection,
    StageRecord,
    TokenScores,
    UserError,
)
from eaft_prune.pipeline import compensation as repair
from eaft_prune.pipeline import conditions as evaluator
from eaft_prune.pipeline.losses import calibration_request, layer_losses, marginal_scores
from eaft_prune.pipeline.session import Bench, Model, with_top_k
from eaft_prune.pipeline.traces import trace_of
from eaft_prune.records import recipe as recipes
from eaft_prune.records.evaluation import compare, save_evaluation
from eaft_prune.stages import evaluate, export
from eaft_prune.stages import plan as planning
from eaft_prune.stages import score as scoring
from eaft_prune.stages.pack import BlockRequest


def select(bench: Bench, base: Model) -> Selection:
    """profile -> score -> plan; a measured loss, or a scores file, instead of profile and score."""
    settings = bench.experiment.pruning
    given = bench.experiment.scores
    scores = recipes.stored_scores(bench, base, given) if given else _scores(bench, base)
    cut = settings.model_dump(include=set(PLAN_SETTINGS))
    inputs: dict[str, str] = {"scores": scores.digest}
    losses: Stored[LayerLosses] | None = None
    if settings.selection == "marginal_loss":
        losses = layer_losses(bench, base, scores)
        inputs["losses"] = losses.digest
    plan = bench.stage(
        "plan",
        planning.VERSION,
        cut,
        inputs,
        KeepPlan,
        lambda: planning.plan(settings, scores.value, None if losses is None else losses.value),
    )
    bench.observer.plan(plan.value)
    return Selection(settings.name, scores.value, plan.value, settings.model_dump(mode="json"))


def _scores(bench: Bench, base: Model) -> Stored[ExpertScores]:
    settings = bench.experiment.pruning
    if settings.measured:
        return marginal_scores(bench, base)
    trace = trace_of(bench, base)
    return bench.stage(
        "score",
        scoring.VERSION,
        settings.scoring,
        {"trace": trace.digest},
        ExpertScores,
        lambda: scoring.score(settings, trace.value),
        lambda value, seconds: {f"{name}_tokens": n for name, n in value.region_tokens.items()},
    )


def profile_request(bench: Bench) -> BlockRequest:
    """The blocks that scores come from: those profiled, or those that losses are measured on."""
    if bench.experiment.pruning.measured:
        return calibration_request(bench)
    settings = bench.experiment.profile
    return BlockRequest(UNION, "profile", settings.seq_len, settings.num_blocks, settings.seed)


def write(bench: Bench, base: Model, selection: Selection) -> Model:
    """export: the pruned checkpoint on disk, opened and hashed again."""
    how = {"criterion": selection.criterion, "pruning": selection.settings}
    return export_plan(bench, base, selection.plan, how, selection.scores)


def measure(
    bench: Bench,
    model: Model,
    label: str,
    base: Model,
    mask: KeepPlan | None = None,
    replicate: int = 0,
    asked: Sequence[BlockRequest] | None = None,
) -> Evaluation:
    """evaluate: one model on every asked pack and length, by default all of the settings."""
    scores: dict[EvalKey, TokenScores] = {}
    token_digests: dict[EvalKey, str] = {}
    for request in requests(bench) if asked is None else asked:
        blocks = bench.blocks(base, request)
        stored = _evaluated(bench, model, label, blocks, request, mask, replicate)
        scores[request.pack, request.seq_len] = stored.value
        token_digests[request.pack, request.seq_len] = blocks.digest
    conditions = evaluator.conditions(bench, model)
    plan_digest = mask.digest if mask else None
    return Evaluation(label, model.digest, plan_digest, scores, token_digests, conditions)


def masked_model(bench: Bench, base: Model) -> tuple[Model, str]:
    """The model that plans are masked in, and the candidate's label, which names `eval.top_k`."""
    top_k = bench.experiment.eval.top_k
    return (base, "masked") if top_k is None else (with_top_k(base, top_k), f"masked_top{top_k}")


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
        *evaluation_key(bench, model.digest, blocks.digest, mask, replicate),
        TokenScores,
        compute,
        lambda value, seconds: {
            "tokens": tokens,
            "scored_tokens": len(value),
            "tokens_per_s": tokens / seconds,
        },
    )


def evaluation_key(
    bench: Bench, model: str, blocks: str, mask: KeepPlan | None, replicate: int = 0
) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Version, settings and inputs that make an evaluation's key."""
    kept = mask.digest if mask and not mask.keeps_all else ""
    settings = {**evaluator.declared(bench), "replicate": replicate}
    if bench.experiment.eval.top_logprobs:
        settings["top_logprobs"] = True
    return evaluate.VERSION, settings, {"model": model, "blocks": blocks, "mask": kept}


def preview(bench: Bench) -> tuple[str, dict[str, str]]:
    """The plan's digest, and the evaluations a pipeline run would have to make.

    They are keyed so that equal ones of several runs have equal keys; the base model is profiled if
    no run has done so yet, nothing is evaluated and nothing exported.
    """
    if bench.experiment.eval.early_stop:
        raise UserError("how much eval.early_stop evaluates is not known before: set it to false")
    base = bench.base()
    check_keep_n(bench, base)
    plan = select(bench, base).plan
    target, key = _export_target(bench, base, plan)
    exported = export.exported_digest(target, key)
    missing: dict[str, str] = {}
    for name in ("base", *bench.experiment.eval.candidates):
        mask = plan if name == "masked" else None
        masked = masked_model(bench, base)[0].digest
        model = {"base": base.digest, "masked": masked, "pruned": exported}[name]
        for request in requests(bench):
            blocks = bench.blocks(base, request).digest
            version, settings, inputs = evaluation_key(bench, model or "", blocks, mask)
            if model is None or not bench.store.holds("evaluate", version, settings, inputs):
                what = f"{name} {request.pack} {request.seq_len}"
                missing[digest([inputs, plan.digest if model is None else ""])] = what
    return plan.digest, missing


def _export_target(bench: Bench, base: Model, plan: KeepPlan) -> tuple[Path, str]:
    settings, runtime = bench.experiment.export, bench.experiment.runtime
    name = f"{bench.experiment.model.name}-keep{plan.size}-{plan.digest[:12]}"
    target = resolve_path(settings.path or str(Path(runtime.checkpoint_dir) / name))
    made: dict[str, Any] = {
        "stage": "export",
        "version": export.VERSION,
        "model": base.digest,
        "plan": plan.digest,
        "max_shard_bytes": settings.max_shard_bytes,
    }
    if level := repair.level(bench, plan):
        made["compensation"] = repair.key(bench, base, plan)
        if settings.path is None:
            target = target.with_name(f"{name}-{level}-{made['compensation'][:8]}")
    return target, digest(made)


def export_plan(
    bench: Bench,
    base: Model,
    plan: KeepPlan,
    how: Mapping[str, Any],
    scores: ExpertScores | None = None,
) -> Model:
    """A plan written as a checkpoint; `how` goes into its manifest, recipe and scores beside it."""
    target, key = _export_target(bench, base, plan)
    repaired = repair.compensated(bench, base, plan)
    how = {**how, **repaired.facts}
    beside = recipes.files_beside(bench, base, plan, how, scores, profile_request(bench))
    total = base.files.weight_bytes * max(len(ids) for ids in plan.kept) // plan.n_experts
    with bench.bars.bar("export", total, "B") as on_bytes:
        done = export.export(
            base.family,
            base.files,
            plan,
            target,
            key,
            bench.experiment.export.max_shard_bytes,
            {"base": recipes.origin(bench, base), **how, **repaired.changed_tensors},
            on_bytes,
            beside,
            bench.experiment.export.pad_ragged,
            repaired.entries,
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
    bench.observer.checkpoint("pruned", model.checkpoint, base.checkpoint, how)
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
    """gate: reports and verdicts, saved evaluations, everything told to the watcher."""
    settings = bench.experiment.gate.over(len(bench.experiment.eval.interim_shares))
    comparison = compare(bench.experiment.eval, settings, base, candidates)
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


def open_base(bench: Bench) -> Model:
    """The base, and every block that will be evaluated: what is missing shows at once."""
    base = bench.base()
    for request in requests(bench):
        bench.blocks(base, request)
    return base


def check_padding(bench: Bench, base: Model) -> None:
    """Raise UserError if layers are to be filled up that this model's routers cannot leave out."""
    if bench.experiment.export.pad_ragged and bench.experiment.pruning.selection != "uniform":
        router_bias(base.family)


def check_keep_n(bench: Bench, base: Model) -> None:
    """Raise UserError unless this model can keep pruning.keep_n experts, padded if asked for."""
    check_padding(bench, base)
    config = base.files.config
    planning.check_keep_n(
        bench.experiment.pruning, base.family.n_experts(config), base.family.top_k(config)
    )
