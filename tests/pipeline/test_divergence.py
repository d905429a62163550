"""KL to the base in a run: one pass a side, kept beside the scores, against its own base alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support import tiny
from support.runs import Done, World

from eaft_prune.config import EvalSettings, GateSettings, resolve_path
from eaft_prune.core.store import load
from eaft_prune.core.types import Blocks, Evaluation
from eaft_prune.pipeline.compare import compare
from eaft_prune.records.evaluation import load_evaluation

pytest_plugins = ("support.worlds",)


def exact_logp(model: Path, blocks: Blocks) -> torch.Tensor:
    with torch.no_grad():
        logits = tiny.eager_model(model)(torch.from_numpy(blocks.ids_BS).long()).logits.double()
    return torch.log_softmax(logits[:, :-1][torch.from_numpy(blocks.scored_BS[:, 1:])], -1)


def both(done: Done) -> tuple[Evaluation, Evaluation]:
    base, pruned = (
        load_evaluation(resolve_path(done.result["evaluations"][name]))
        for name in ("base", "pruned")
    )
    return base, pruned


def test_kl_is_that_of_the_exported_checkpoint(world: World, pipeline: Done) -> None:
    result = pipeline.result
    (packed,) = (s for s in result["stages"] if s["stage"] == "pack/eval/UNION/64")
    blocks = load(world.store / "pack" / packed["key"], Blocks)
    pruned = Path(result["checkpoint"]["path"])
    p, q = exact_logp(world.model, blocks), exact_logp(pruned, blocks)
    whole = (p.exp() * (p - q)).sum(-1).numpy()
    base, candidate = both(pipeline)
    found = candidate.scores["UNION", 64].kl_T
    assert found is not None
    assert base.scores["UNION", 64].kl_T is None
    # 64 of 300 tokens are classes of their own: a lower bound of most of it
    assert (found <= whole + 0.002 * np.sqrt(2 * whole) + 1e-5).all()
    assert found.mean() > 0.3 * whole.mean()
    told = result["reports"]["pruned"]["UNION"]["64"]
    assert told["kl_mean"] == pytest.approx(found.mean())
    assert told["top1_flips"] == pytest.approx(np.mean(~np.asarray(p.argmax(-1) == q.argmax(-1))))
    assert set(result["changes"]["pruned"]["UNION"]["64"]["kl_p99"]) > {"low", "high"}
    assert "kl_mean" not in result["reports"]["base"]["UNION"]["64"]


def test_one_pass_a_side_and_one_table_of_the_base_for_all(world: World, pipeline: Done) -> None:
    kept = {path: path.stat().st_mtime_ns for path in world.store.glob("likeliest/*/record.json")}
    assert len(kept) >= 8  # three packs and UNION at two lengths
    asked = ("eval.packs=null", "eval.seq_lens=[32,64]", "eval.num_blocks=[120,60]")
    again = world.run(*asked, "gate.seq_lens=[32,64]", "eval.candidates=[masked]")
    assert again.code == 0, again.out + again.err
    stages = {s["stage"]: s["cached"] for s in again.result["stages"]}
    assert stages["evaluate/base/UNION/64"]
    assert not stages["divergence/masked/UNION/64"]
    cached = world.run(*asked, "gate.seq_lens=[32,64]", "eval.candidates=[masked]").result
    assert all(s["cached"] for s in cached["stages"])
    assert {p: p.stat().st_mtime_ns for p in world.store.glob("likeliest/*/record.json")} == kept
    told = [r["reports"]["masked"]["UNION"]["64"]["kl_mean"] for r in (again.result, cached)]
    assert told[0] == told[1]


def test_scores_are_those_of_a_run_without_it(world: World, pipeline: Done) -> None:
    """The evaluations of a run that compares nothing are found, and compared when asked."""
    asked = ("eval.num_blocks=4", "eval.seed=5", "pruning=reap")
    plain = world.run(*asked, "eval.kl_top_k=null")
    assert plain.code == 0, plain.out + plain.err
    assert not any("diverg" in s["stage"] or "likel" in s["stage"] for s in plain.result["stages"])
    done = world.run(*asked).result
    cached = {s["stage"]: s["cached"] for s in done["stages"]}
    assert cached["evaluate/pruned/UNION/64"]
    assert not cached["divergence/pruned/UNION/64"]
    assert done["reports"]["pruned"]["UNION"]["64"]["kl_mean"] > 0
    assert "kl_mean" not in plain.result["reports"]["pruned"]["UNION"]["64"]


def test_kl_to_another_base_is_left_out(pipeline: Done, world: World) -> None:
    base, pruned = both(pipeline)
    assert pruned.compared_with == base.checkpoint_digest
    settings, gate = world_settings()
    mine = compare(settings, gate, base, [pruned])
    other = compare(settings, gate, replace(base, checkpoint_digest="another"), [pruned])
    key = ("UNION", 64)
    assert "kl_mean" in mine.reports["pruned"][key].further
    assert "kl_mean" not in other.reports["pruned"][key].further
    assert mine.reports["pruned"][key].ppl == other.reports["pruned"][key].ppl


def world_settings() -> tuple[EvalSettings, GateSettings]:
    from support.gates import v1

    asked = EvalSettings(name="x", seq_lens=(32, 64), num_blocks=1)
    return asked, v1(seq_lens=(32, 64))
