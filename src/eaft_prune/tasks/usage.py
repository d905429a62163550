"""task=usage: the frequency criterion from a serving engine, without a routing trace."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from eaft_prune.checkpoints.read import SCORES
from eaft_prune.core.store import Stored
from eaft_prune.core.types import ExpertScores, Outcome
from eaft_prune.pipeline import conditions as evaluator
from eaft_prune.pipeline.arrow import profile_request
from eaft_prune.pipeline.session import Bench, Model
from eaft_prune.records.recipe import origin, scores_file, to_yaml
from eaft_prune.records.result import write_atomically

if TYPE_CHECKING:
    from eaft_prune.engines.sglang.engine import SglangEngine


def run_usage(bench: Bench, out: Path) -> Outcome:
    """A scores file of how often the server selects each expert, over every token it reads.

    The frequency criterion counts at scored tokens' predictor positions alone; this counts all.
    """
    base, settings = bench.base(), bench.experiment.pruning
    scores = _recorded(bench, base, out / "usage").value
    top_k = base.family.top_k(base.files.config)
    file = scores_file(scores, settings.name, settings.scoring, origin(bench, base), top_k)
    write_atomically(out / SCORES, to_yaml(file))
    bench.observer.artifact(out / SCORES)
    share = scores.count_LE / scores.count_LE.sum(axis=1, keepdims=True)
    facts = {
        "scores": str(out / SCORES),
        "selections_a_layer": int(scores.count_LE[0].sum()),
        "never_selected": int((scores.count_LE == 0).sum()),
        "largest_share": float(share.max()),
    }
    text = f"{facts['never_selected']} of {scores.count_LE.size} experts were never selected"
    return Outcome(base=base.checkpoint, facts=facts, text=f"{text}\n{'scores':<11} {out / SCORES}")


def _recorded(bench: Bench, base: Model, folder: Path) -> Stored[ExpertScores]:
    request = profile_request(bench)
    blocks = bench.blocks(base, request)
    config = base.files.config
    tokens = request.num_blocks * request.seq_len

    def compute() -> ExpertScores:
        from eaft_prune.engines.sglang.usage import recording, selections

        how = recording(bench.experiment.engine, folder)
        server = replace(bench, experiment=bench.experiment.model_copy(update={"engine": how}))
        engine = cast("SglangEngine", server.engine(base))
        shape = base.family.n_layers(config), base.family.n_experts(config)
        with bench.bars.bar("usage", tokens, "tok") as on_tokens:
            count_LE = selections(engine, blocks.value, *shape, folder, on_tokens)
        score_LE = count_LE.astype(np.float64)
        return ExpertScores(score_LE, score_LE, count_LE, {}, score_LE[None])

    return bench.stage(
        "usage",
        1,
        evaluator.declared(bench),
        {"model": base.digest, "blocks": blocks.digest},
        ExpertScores,
        compute,
        lambda value, seconds: {"tokens": tokens, "tokens_per_s": tokens / seconds},
    )
