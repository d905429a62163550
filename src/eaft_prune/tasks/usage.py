"""task=usage: the frequency criterion from a serving engine, without a routing trace."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from eaft_prune.checkpoints.model import Model
from eaft_prune.checkpoints.read import SCORES
from eaft_prune.config import Experiment, PruningSettings
from eaft_prune.core.files import write_atomically
from eaft_prune.core.outcome import Outcome
from eaft_prune.core.step import Step
from eaft_prune.core.store import Stored
from eaft_prune.core.types import ExpertScores, UserError
from eaft_prune.pipeline.export import origin
from eaft_prune.pipeline.requests import scoring
from eaft_prune.pipeline.session import Session
from eaft_prune.records.scores import scores_file, scores_text

if TYPE_CHECKING:
    from eaft_prune.engines.sglang.engine import SglangEngine


def check_usage(experiment: Experiment) -> None:
    """Raise UserError unless a server is launched that records what frequency counts."""
    if experiment.engine.python is None:
        raise UserError("task=usage launches a server that records: give engine.python")
    counts = PruningSettings(
        name="frequency", keep_n=1, saliency="one", weight="uniform", reduce="sum"
    )
    if experiment.pruning.scoring != counts.scoring:
        raise UserError(
            "task=usage counts selections: use pruning=frequency as it is, not "
            f"pruning={experiment.pruning.name}"
        )


def run_usage(session: Session, out: Path) -> Outcome:
    """A scores file of how often the server selects each expert, over every token it reads.

    The frequency criterion counts at scored tokens' predictor positions alone; this counts all.
    """
    base, settings = session.base(), session.experiment.pruning
    scores = _recorded(session, base, out / "usage").value
    where = origin(session, base)
    file = scores_file(scores, settings.name, settings.scoring, where, base.top_k)
    write_atomically(out / SCORES, scores_text(file))
    session.observer.artifact(out / SCORES)
    share = scores.count_LE / scores.count_LE.sum(axis=1, keepdims=True)
    facts = {
        "scores": str(out / SCORES),
        "selections_a_layer": int(scores.count_LE[0].sum()),
        "never_selected": int((scores.count_LE == 0).sum()),
        "largest_share": float(share.max()),
    }
    text = f"{facts['never_selected']} of {scores.count_LE.size} experts were never selected"
    return Outcome(base=base.checkpoint, facts=facts, text=f"{text}\n{'scores':<11} {out / SCORES}")


def _recorded(session: Session, base: Model, folder: Path) -> Stored[ExpertScores]:
    blocks = session.blocks(base, scoring(session.experiment))
    tokens = blocks.value.ids_BS.size

    def compute() -> ExpertScores:
        from eaft_prune.engines.sglang.usage import recording, selections

        how = recording(session.experiment.engine, folder)
        server = replace(session, experiment=session.experiment.model_copy(update={"engine": how}))
        engine = cast("SglangEngine", server.scorer(base))
        shape = base.n_layers, base.n_experts
        with session.bars.bar("usage", tokens, "tok") as on_tokens:
            count_LE = selections(engine, blocks.value, *shape, folder, on_tokens)
        score_LE = count_LE.astype(np.float64)
        return ExpertScores(score_LE, score_LE, count_LE, {}, score_LE[None])

    step = Step(
        "usage",
        1,
        session.kind.key(session.options),
        {"model": base.digest, "blocks": blocks.digest},
        ExpertScores,
        compute,
        lambda value, seconds: {"tokens": tokens, "tokens_per_s": tokens / seconds},
    )
    return session.run(step)
