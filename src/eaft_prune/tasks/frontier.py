"""task=frontier: the smallest size that passes, found on profiling rows, proven on unseen ones."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from eaft_prune.checkpoints.model import Model
from eaft_prune.config import Experiment
from eaft_prune.core.files import write_atomically
from eaft_prune.core.frontier import Frontier, Point
from eaft_prune.core.outcome import Outcome, Selection
from eaft_prune.core.types import UserError
from eaft_prune.core.verdict import GateVerdict
from eaft_prune.engines.registry import engine_kind
from eaft_prune.pipeline import ladder
from eaft_prune.pipeline.arrow import Origin, check_target, open_base, prove
from eaft_prune.pipeline.candidates import rivals
from eaft_prune.pipeline.compare import Outputs, compare
from eaft_prune.pipeline.evaluation import Side
from eaft_prune.pipeline.export import write
from eaft_prune.pipeline.frontier import Search, climb, point_of, sizes_of
from eaft_prune.pipeline.frontier_cost import tokens_per_s, work
from eaft_prune.pipeline.generation import generated
from eaft_prune.pipeline.ladder import settings_of, trying, with_settings
from eaft_prune.pipeline.sequential import measure_all
from eaft_prune.pipeline.session import Session
from eaft_prune.report.frontier import (
    frontier_frame,
    frontier_markdown,
    frontier_table,
    sentence,
)
from eaft_prune.report.frontier_html import frontier_html
from eaft_prune.report.terminal import listing

log = logging.getLogger(__name__)

_GB = 1e9


@dataclass(frozen=True)
class _Proven:
    """A size that was taken to the unseen rows."""

    point: Point
    model: Model
    selection: Selection
    verdict: GateVerdict


def check_frontier(experiment: Experiment) -> None:
    """Raise UserError where there is nothing to search on, or to prove on, or no one size."""
    pruning, settings = experiment.pruning, experiment.frontier
    assert settings is not None, "the task's own section was asked for"
    if experiment.packs.split == "none":
        raise UserError(
            "task=frontier with packs.split = 'none' leaves no rows that the search has not seen: "
            "use packs.split=hash"
        )
    if not engine_kind(experiment.engine.name).profiles:
        raise UserError(
            f"engine={experiment.engine.name} cannot mask experts, which task=frontier tries sizes "
            "by: use engine=transformers"
        )
    if pruning.selection != "uniform":
        raise UserError(
            f"pruning.selection = {pruning.selection!r}: task=frontier asks for one number of "
            "experts in every layer: use pruning.selection=uniform"
        )
    if pruning.compensation != "none":
        raise UserError(
            f"pruning.compensation = {pruning.compensation!r}: task=frontier repairs where ranking "
            "alone fails: drop it, and say how by frontier.repair"
        )
    if pruning.saliency == "greedy" and {"ranking", "greedy"} <= set(settings.ladder):
        raise UserError(
            "pruning = 'greedy' is the method `greedy` of frontier.ladder too: leave that out, or "
            "choose another criterion"
        )


def foretell_frontier(session: Session) -> str:
    """What would be tried and what that takes at most; profiles the model if no run has."""
    base = open_base(session)
    return _plan(session, base, sizes_of(session, base))


def run_frontier(session: Session, out: Path) -> Outcome:
    """Search, prove what was found, and say it in a table, a page and one sentence."""
    base = open_base(session)
    sizes = sizes_of(session, base)
    check_target(session, base)
    others = rivals(session, base, settings_of(session).rivals)
    log.info("%s", _plan(session, base, sizes))
    search = Search(session, base, sizes)
    best = climb(search)
    tried = [] if best is None else sizes[sizes.index(best) :][: settings_of(session).proofs]
    gate = session.experiment.gate.over(max(len(tried), 1))
    proving = with_settings(session, gate=gate)
    proven = _prove(proving, search, tried)
    outcome = _judged(proving, out, base, proven[-1:], others)
    points = [*search.points.values(), *(one.point for one in proven)]
    if outcome.comparison is not None:
        points += [
            point_of(
                outcome.comparison, m.label, m.label, m.files.weight_bytes / _GB, "proof", None
            )
            for m in others
        ]
    answer = next((one.point for one in proven if one.point.status == "PASS"), None)
    frontier = Frontier(
        session.experiment.model.name, gate.name, gate.confidence, gate.max_dppl_relative,
        base.n_experts, base.files.weight_bytes / _GB, tuple(points), answer,
    )  # fmt: skip
    files = _write(session, out, frontier)
    text = "\n\n".join([frontier_table(frontier), sentence(frontier)])
    text += "".join(f"\n{name:<11} {path}" for name, path in files.items())
    refused = answer is None and session.experiment.gate.on_fail == "error"
    return replace(outcome, facts=_facts(frontier), text=text, differs=refused)


def _plan(session: Session, base: Model, sizes: Sequence[int]) -> str:
    if "ranking" in settings_of(session).ladder:
        ladder.ranking(trying(session), base, sizes[0])  # profiled now, it says how fast
    parts, rate = work(session, base, sizes), tokens_per_s(session)
    rows = [(one.what, f"{one.tokens:,}", f"{one.bytes / _GB:.3f}" if one.bytes else "")
            for one in parts]  # fmt: skip
    total = sum(one.tokens for one in parts)
    rows.append(("together", f"{total:,}", f"{sum(one.bytes for one in parts) / _GB:.3f}"))
    said = f"sizes {', '.join(map(str, sizes))} of {base.n_experts} experts a layer; at most"
    took = "" if rate is None else (
        f"\nat the {rate:,.0f} tokens/s of profiling {total / rate / 60:,.1f} minutes; early looks "
        "and what is in the store take less"
    )  # fmt: skip
    heads = ("what", "tokens", "GB written")
    return f"{said}\n{listing(heads, rows, right=heads[1:])}{took}"


def _prove(session: Session, search: Search, tried: Sequence[int]) -> list[_Proven]:
    """Sizes from the smallest up, exported and measured on unseen rows, until one passes."""
    base, proven = search.base, list[_Proven]()
    for keep_n in tried:
        method = search.cheapest(keep_n)
        assert method is not None, "a size is proven that passed in the search"
        selection = method.selection(base, keep_n)
        session.observer.plan(selection.plan)
        model = write(method.within(session, keep_n), base, selection)
        sides = [Side("base", base), Side("pruned", model)]
        found, written = measure_all(session, base, sides), generated(session, base, sides)
        looks = len(session.experiment.eval.interim_shares)
        gate = session.experiment.gate.over(looks)
        outputs = Outputs(written)
        made = compare(session.experiment.eval, gate, found[0], found[1:], outputs=outputs)
        gigabytes = model.files.weight_bytes / _GB
        point = point_of(made, "pruned", method.name, gigabytes, "proof", keep_n)
        point = replace(point, plan=selection.plan.digest, path=model.files.path)
        proven.append(_Proven(point, model, selection, made.verdicts["pruned"]))
        if point.status == "PASS":
            break
    return proven


def _judged(
    session: Session, out: Path, base: Model, proven: Sequence[_Proven], others: Sequence[Model]
) -> Outcome:
    """The last size that was proven and all rivals against the base, in one comparison."""
    models = [one.model for one in proven]
    if not models and not others:
        return Outcome(base=base.checkpoint)
    sides = [Side("base", base), *(Side(m.label, m) for m in (*models, *others))]
    selection = proven[0].selection if proven else None
    pruned = models[0].checkpoint if models else None
    return prove(session, out, sides, Origin(selection, base.checkpoint, pruned))


def _facts(frontier: Frontier) -> dict[str, Any]:
    answer = frontier.answer
    found = {} if answer is None else {
        "keep_n": answer.keep_n, "method": answer.method, "gb": answer.gb,
        "dppl_percent": 100 * answer.growth,
    }  # fmt: skip
    return {
        "sentence": sentence(frontier),
        "base_gb": frontier.base_gb,
        "points_tried": len(frontier.of("search")),
        **found,
    }


def _write(session: Session, out: Path, frontier: Frontier) -> Mapping[str, Path]:
    """The page, its Markdown twin and the rows, kept with the run."""
    experiment = session.experiment
    about = {
        "base": experiment.model.name,
        "criterion": experiment.pruning.name,
        "gate": frontier.gate,
        "packs": experiment.packs.name,
    }
    facts = {
        section: getattr(experiment, section).model_dump(mode="json")
        for section in ("frontier", "pruning", "profile", "eval", "gate")
    }
    texts = {
        "frontier.html": frontier_html(frontier, facts, about),
        "frontier.md": frontier_markdown(frontier),
        "frontier.csv": frontier_frame(frontier).to_csv(index=False, lineterminator="\r\n"),
    }
    for name, content in texts.items():
        write_atomically(out / name, content)
        session.observer.artifact(out / name)
    return {"frontier": out / "frontier.html", "points": out / "frontier.csv"}
