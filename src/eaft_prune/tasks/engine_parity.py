"""task=engine_parity: the same blocks through transformers and through a server."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from eaft_prune.checks.engine_parity import parity
from eaft_prune.config import EngineSettings
from eaft_prune.core.outcome import Outcome
from eaft_prune.pipeline.arrow import open_base
from eaft_prune.pipeline.evaluation import Side, measure
from eaft_prune.pipeline.session import Session
from eaft_prune.report.terminal import listing

_COLUMNS = {
    "max dlnp": "max_dlogp",
    "mean": "mean_dlogp",
    "max dH": "max_dentropy",
    "mean ": "mean_dentropy",
    "dPPL": "dppl",
    "dCC": "dcc_rate",
    "dp": "dmean_prob",
    "JS2D": "js2d",
}


def run_engine_parity(session: Session, out: Path) -> Outcome:
    """Differences a pack and length; facts, no verdict: what is small depends on the dtype."""
    base = open_base(session)
    engine = EngineSettings(name="transformers", experts=session.experiment.engine.experts)
    local = replace(session, experiment=session.experiment.model_copy(update={"engine": engine}))
    ours = measure(local, base, Side("transformers", base))
    theirs = measure(session, base, Side(session.kind.name, base))
    found = {
        f"{pack}/{seq_len}": parity(
            ours.scores[pack, seq_len], scores, session.experiment.eval.cc_quantile
        )
        for (pack, seq_len), scores in theirs.scores.items()
    }
    rows = [
        [name, *(f"{values[c]:.1e}" for c in _COLUMNS.values())] for name, values in found.items()
    ]
    server = {k: theirs.conditions[k] for k in ("version", "top_k")}
    facts = {"parity": found, "transformers_dtype": local.dtype, "server": server}
    return Outcome(base=base.checkpoint, facts=facts, text=listing(("blocks", *_COLUMNS), rows))
