"""What an evaluation's numbers depend on besides weights and tokens: keys and conditions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from eaft_prune.pipeline.session import Bench, Model
from eaft_prune.pipeline.traces import numerics


@dataclass(frozen=True)
class ServerConditions:
    """What a launched server said of itself when it last scored a checkpoint."""

    values: Mapping[str, Any]


def declared(bench: Bench) -> dict[str, Any]:
    """What evaluations are keyed by: known before any model is loaded or server launched.

    Of a launched server its version, arguments and environment; of a given one its own account.
    """
    engine, top = bench.experiment.engine, bench.experiment.eval.entropy_top_k
    if engine.name == "transformers":
        return numerics(bench)
    from eaft_prune.engines.sglang import server as sglang_server

    if engine.base_url is not None:
        server = sglang_server.connect(engine, engine.base_url)
        how: dict[str, Any] = {"version": server.version, "server": dict(server.args)}
    else:
        assert engine.python is not None, "config requires one of base_url and python"
        version = sglang_server.probe_version(engine.python)
        how = {"version": version, "args": list(engine.args), "env": engine.env}
    return {"engine": "sglang", "entropy_top_k": top, **how}


def conditions(bench: Bench, model: Model) -> dict[str, Any]:
    """What both sides of a comparison must have in common."""
    if bench.experiment.engine.name == "transformers":
        return {**numerics(bench), "top_k": model.family.top_k(model.files.config)}
    if bench.experiment.engine.base_url is not None:
        return dict(bench.engine(model).conditions)
    stored = bench.stage(
        f"server/{model.label}",
        1,
        declared(bench),
        {"model": model.digest},
        ServerConditions,
        lambda: ServerConditions(bench.engine(model).conditions),
    )
    return dict(stored.value.values)
