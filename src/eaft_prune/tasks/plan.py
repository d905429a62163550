"""task=plan: a keep plan from a scores file alone."""

from __future__ import annotations

import json
from pathlib import Path

from eaft_prune.config import resolve_path
from eaft_prune.core.files import write_atomically
from eaft_prune.core.outcome import Outcome, Selection
from eaft_prune.core.text import id_ranges
from eaft_prune.pipeline.session import Session
from eaft_prune.records.recipe import plan_facts
from eaft_prune.records.scores import read_scores
from eaft_prune.stages.plan import check_keep_n, plan

FILE = "plan.json"


def run_plan(session: Session, out: Path) -> Outcome:
    """Cut a plan with pruning.keep_n and the core settings; no model, no packs.

    How experts were scored is the file's affair: the other pruning settings are not read.
    """
    assert session.experiment.scores is not None, "config requires scores for this task"
    file = read_scores(resolve_path(session.experiment.scores))
    settings = session.experiment.pruning
    check_keep_n(settings, file.n_experts, file.top_k)
    cut = plan(settings, file.scores)
    session.observer.plan(cut)
    text = json.dumps({"criterion": file.criterion, "base": file.base, **plan_facts(cut)}, indent=1)
    write_atomically(out / FILE, text + "\n")
    layers = [f"layer {layer:>3}  {id_ranges(ids)}" for layer, ids in enumerate(cut.kept)]
    return Outcome(
        selection=Selection(file.criterion, file.scores, cut, file.scoring),
        facts={"plan": str(out / FILE), "plan_digest": cut.digest},
        text="\n".join([*layers, f"{'digest':<11} {cut.digest}", f"{'plan':<11} {out / FILE}"]),
    )
