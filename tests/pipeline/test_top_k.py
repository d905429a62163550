"""eval.top_k: a candidate that routes to fewer experts than the base, asked for and named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import tiny
from support.runs import World

from eaft_prune.config import resolve_path
from eaft_prune.core.store import load
from eaft_prune.core.types import Blocks, KeepPlan
from eaft_prune.records.evaluation import load_evaluation

pytest_plugins = ("support.worlds",)


def eager_scores(model: Path, plan: KeepPlan, blocks: Blocks, top_k: int) -> np.ndarray[Any, Any]:
    """transformers' own forward, routers by hand: bias -inf for the dropped, top_k of the rest."""
    eager = tiny.eager_model(model)
    for layer, kept in zip(eager.model.layers, plan.kept, strict=True):
        router = layer.mlp.router
        bias = torch.full_like(router.bias.data, -torch.inf)
        bias[list(kept)] = router.bias.data[list(kept)]
        router.bias.data, router.top_k = bias, top_k
    with torch.no_grad():
        logits = eager(torch.from_numpy(blocks.ids_BS).long()).logits.double()
    logp = torch.log_softmax(logits, -1).numpy()
    return np.array([logp[b, t - 1, blocks.ids_BS[b, t]] for b, t in np.argwhere(blocks.scored_BS)])


def test_the_candidate_routes_to_fewer_and_the_base_does_not(world: World) -> None:
    done = world.run("eval.candidates=[masked]", "eval.top_k=1")
    assert done.code == 0, done.out + done.err
    result = done.result
    assert set(result["reports"]) == {"base", "masked_top1"}
    base, candidate = (
        load_evaluation(resolve_path(result["evaluations"][name]))
        for name in ("base", "masked_top1")
    )
    assert (base.conditions["top_k"], candidate.conditions["top_k"]) == (2, 1)
    assert base.checkpoint_digest != candidate.checkpoint_digest
    (packed,) = (s for s in result["stages"] if s["stage"] == "pack/eval/UNION/64")
    blocks = load(world.store / "pack" / packed["key"], Blocks)
    kept = tuple(tuple(ids) for ids in result["plan"]["kept"])
    for evaluation, plan, top_k in (
        (base, KeepPlan((tuple(range(8)),) * 2, 8), 2),
        (candidate, KeepPlan(kept, 8), 1),
    ):
        expected = eager_scores(world.model, plan, blocks, top_k)
        found = evaluation.scores["UNION", 64].logp_T
        np.testing.assert_allclose(found, expected, atol=5e-4, rtol=5e-4)
    names = {check["name"] for check in result["gate"]["checks"]}
    assert "dcc_rate" in names  # fewer experts can amplify confident conflicts
    # what was evaluated with the model's own top-k is still that
    plain = world.run("eval.candidates=[masked]").result
    assert plain["reports"]["base"] == result["reports"]["base"]
    assert plain["reports"]["masked"] != result["reports"]["masked_top1"]
    # and the two are not compared by accident
    refused = world.run(
        "task=compare",
        f"compare.base={result['evaluations']['base']}",
        f"compare.candidate={result['evaluations']['masked_top1']}",
    )
    assert "top_k" in refused.failed()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["eval.top_k=1"], ["eval.top_k = 1", "eval.candidates=[masked]"]),
        (["eval.top_k=1", "eval.candidates=[masked]", "task=noise_floor"], ["task=noise_floor"]),
        (["eval.top_k=0", "eval.candidates=[masked]"], ["eval.top_k", "0"]),
    ],
)
def test_a_lever_without_effect_is_refused(
    world: World, overrides: list[str], said: list[str]
) -> None:
    line = world.run(*overrides).refused()
    assert all(word in line for word in said)


def test_more_experts_than_the_model_routes_to_is_an_error(world: World) -> None:
    done = world.run("eval.candidates=[masked]", "eval.top_k=3")
    error = done.failed()
    assert "eval.top_k = 3" in error
    assert "1..2" in error
