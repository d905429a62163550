"""The arrow on one screen: pack -> profile -> score -> plan -> export -> evaluate -> gate."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from eaft_prune.checkpoints.model import Model
from eaft_prune.checkpoints.pad import check_switches
from eaft_prune.checks.preflight import check_engine
from eaft_prune.config import resolve_path
from eaft_prune.core.files import why_not_writable
from eaft_prune.core.generation import GenerationReport
from eaft_prune.core.harness import TaskReport
from eaft_prune.core.outcome import Outcome, Selection
from eaft_prune.core.passages import Passage
from eaft_prune.core.types import Checkpoint, Evaluation, UserError
from eaft_prune.packs.sources import model_path
from eaft_prune.pipeline import harness, smoke
from eaft_prune.pipeline.compare import Outputs, compare
from eaft_prune.pipeline.criterion import select
from eaft_prune.pipeline.evaluation import Side, masked_model
from eaft_prune.pipeline.export import write
from eaft_prune.pipeline.figures import from_store
from eaft_prune.pipeline.generation import generated, prompts_of
from eaft_prune.pipeline.passages import differing
from eaft_prune.pipeline.requests import evaluating
from eaft_prune.pipeline.sequential import measure_all
from eaft_prune.pipeline.session import Session
from eaft_prune.records import card
from eaft_prune.records.evaluation import save_evaluation
from eaft_prune.records.signature import private_key
from eaft_prune.report.markdown import verdict_section
from eaft_prune.stages import export
from eaft_prune.stages.plan import check_keep_n


@dataclass(frozen=True)
class Origin:
    """What the evaluations of a run are of, as far as it made that."""

    selection: Selection | None = None
    base: Checkpoint | None = None
    pruned: Checkpoint | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    generated: Mapping[str, GenerationReport] = field(default_factory=dict)
    passages: Mapping[str, Sequence[Passage]] = field(default_factory=dict)
    tasks: Mapping[str, Mapping[str, TaskReport]] = field(default_factory=dict)


def run_arrow(session: Session, out: Path) -> Outcome:
    """Prune and prove: everything from packs to verdict."""
    experiment = session.experiment
    base = open_base(session)
    check_plan_fits(session, base)
    if "pruned" in experiment.eval.candidates:
        check_target(session, base)
        smoke.check(session, base)
    tasks = harness.asked(session, base)
    selection = select(session, base)
    sides = [Side("base", base)]
    pruned: Model | None = None
    for name in experiment.eval.candidates:
        if name == "masked":
            model, label = masked_model(session, base)
            sides.append(Side(label, model, selection.plan))
        else:
            pruned = write(session, base, selection)
            sides.append(Side(name, pruned))
    found = measure_all(session, base, sides)
    passages = {other.model: differing(session, base, found[0], other) for other in found[1:]}
    first_tokens = [] if pruned is None else smoke.smoke(session, pruned)
    origin = Origin(
        selection,
        base.checkpoint,
        None if pruned is None else pruned.checkpoint,
        facts={"smoke": first_tokens} if first_tokens else {},
        generated=generated(session, base, sides),
        passages=passages,
        tasks=harness.answered(session, sides, tasks),
    )
    return judge(session, out, found, origin)


def prove(session: Session, out: Path, sides: Sequence[Side], origin: Origin) -> Outcome:
    """The base, first of the sides, and the others: measured, asked to write, judged."""
    base = sides[0].model
    found, written = measure_all(session, base, sides), generated(session, base, sides)
    passages = {other.model: differing(session, base, found[0], other) for other in found[1:]}
    return judge(session, out, found, replace(origin, generated=written, passages=passages))


def judge(session: Session, out: Path, evaluations: list[Evaluation], origin: Origin) -> Outcome:
    """gate: reports and verdicts on all but the first, the base; the watcher hears of each.

    The card of an exported candidate tells its verdict.
    """
    base, *candidates = evaluations
    looks = len(session.experiment.eval.interim_shares)
    settings, second = session.experiment.gate.over(looks), session.experiment.second_gate
    beside = None if second is None else second.over(looks)
    comparison = compare(
        session.experiment.eval,
        settings,
        base,
        candidates,
        beside,
        Outputs(origin.generated, origin.tasks),
        partial(from_store, session),
    )
    comparison = replace(comparison, passages=origin.passages)
    saved = {}
    for model in evaluations:
        saved[model.model] = out / "evaluations" / model.model
        # of an earlier run in the same hydra.run.dir or hydra.sweep.dir
        shutil.rmtree(saved[model.model], ignore_errors=True)
        save_evaluation(saved[model.model], model)
        reference = None if model is base else comparison.reports[base.model]
        session.observer.reports(model.model, comparison.reports[model.model], reference)
    for label, answers in origin.tasks.items():
        figures = harness.in_numbers(answers)
        first = label == candidates[0].model
        session.observer.facts({"tasks": figures if first else {label: figures}})
    for verdict in list(comparison.verdicts.values())[:1]:
        session.observer.verdict(verdict)
    for verdict in list(comparison.beside.values())[:1]:
        session.observer.beside(verdict)
    pruned = origin.pruned
    if pruned is not None and pruned.label in comparison.verdicts:
        card.tell(pruned.path, verdict_section(comparison, pruned.label, settings.measured))
    return Outcome(comparison, origin.selection, origin.base, origin.pruned, saved, origin.facts)


def open_base(session: Session) -> Model:
    """The base, and every block and prompt that it will be asked: what is missing shows at once."""
    longest, path = max(session.experiment.eval.seq_lens), model_path(session.experiment.model)
    session.kind.check(session.options, longest, path)
    base = session.base()
    for request in evaluating(session.experiment):
        session.blocks(base, request)
    if session.experiment.eval.generation:
        prompts_of(session, base)
    return base


def check_target(session: Session, base: Model) -> None:
    """Raise UserError where an export could not be written or signed: before any work is done.

    That is where `export.path` holds something else or another base's export, where
    `runtime.checkpoint_dir` may not be written, or `export.sign` is no private key.
    """
    settings = session.experiment.export
    if settings.sign:
        private_key(resolve_path(settings.sign))
    if settings.path:
        export.check_target(resolve_path(settings.path), base.digest)
        return
    directory = resolve_path(session.experiment.runtime.checkpoint_dir)
    if why := why_not_writable(directory):
        raise UserError(f"runtime.checkpoint_dir = {str(directory)!r}: {why}")


def check_padding(session: Session, base: Model) -> None:
    """Raise UserError if layers are to be filled up that this model's routers cannot leave out."""
    experiment = session.experiment
    if experiment.export.pad_ragged and experiment.pruning.selection != "uniform":
        check_switches(base.family, base.files)


def check_plan_fits(session: Session, base: Model) -> None:
    """Raise UserError unless this model can keep pruning.keep_n experts, padded if asked for."""
    check_padding(session, base)
    check_engine(base.files.config, session.experiment.pruning.keep_n, session.experiment.engine)
    check_keep_n(session.experiment.pruning, base.n_experts, base.top_k, base.groups, base.least)
