"""Measured losses against loops over transformers' own forward with -inf in its routers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import tiny
from support.runs import World

from eaft_prune.cli.main import check
from eaft_prune.core.types import Blocks, ExpertScores, KeepPlan, LayerLosses, UserError
from eaft_prune.maths.allocation import cheapest
from eaft_prune.stages.losses import Stop, greedy, layer_losses, leave_one_out
from eaft_prune.stages.plan import plan

if TYPE_CHECKING:
    from eaft_prune.engines.transformers import TransformersEngine

pytest_plugins = ("support.worlds",)

LAYERS, EXPERTS = 2, 8
Pair = tuple[int, int]  # layer, expert


def nothing(done: int) -> None:
    pass


@pytest.fixture(scope="module")
def eager(checkpoint: Path) -> Any:
    return tiny.eager_model(checkpoint).requires_grad_(False)


@pytest.fixture(scope="module")
def blocks(make_blocks: Callable[..., Blocks]) -> Blocks:
    return make_blocks(4, 24)


@pytest.fixture(scope="module")
def alone(engine: TransformersEngine, blocks: Blocks) -> ExpertScores:
    return leave_one_out(engine, blocks, None, nothing)


def token_nll(model: Any, blocks: Blocks, dropped: Collection[Pair]) -> Any:
    """-ln p of every scored token, by transformers, with these experts never routed to."""
    routers = [layer.mlp.router for layer in model.model.layers]
    before = [router.bias.data.clone() for router in routers]
    for layer, expert in dropped:
        routers[layer].bias.data[expert] = -torch.inf
    ids = torch.from_numpy(blocks.ids_BS).long()
    with torch.no_grad():
        logp = torch.log_softmax(model(ids).logits.double(), -1)[:, :-1]
    for router, bias in zip(routers, before, strict=True):
        router.bias.data = bias
    nll = -logp.gather(2, ids[:, 1:, None])[:, :, 0].numpy()
    return nll[blocks.scored_BS[:, 1:]]


def test_scores_are_the_loss_of_each_expert_alone(
    engine: TransformersEngine, eager: Any, blocks: Blocks, alone: ExpertScores
) -> None:
    whole = token_nll(eager, blocks, ())
    pack = blocks.row_packs[blocks.row_BS[blocks.scored_BS]]
    ids = engine.trace(blocks, nothing).experts_TLK
    for layer, expert in itertools.product(range(LAYERS), range(EXPERTS)):
        change = token_nll(eager, blocks, [(layer, expert)]) - whole
        assert alone.score_LE[layer, expert] == pytest.approx(change.mean(), abs=2e-5)
        shares = [change[pack == p].sum() / len(change) for p in (0, 1)]
        np.testing.assert_allclose(
            alone.pack_mass_PLE[:, layer, expert], np.maximum(shares, 0), atol=2e-5
        )
        mass = alone.positive_mass_LE[layer, expert]
        assert mass == pytest.approx(sum(max(share, 0) for share in shares), abs=4e-5)
        assert alone.count_LE[layer, expert] == sum(expert in row for row in ids[:, layer].tolist())


def naive_greedy(
    model: Any, blocks: Blocks, rounds: int, candidates: int
) -> list[tuple[list[int], set[int]]]:
    """Per layer the experts in the order they go, and those that stay."""
    whole = token_nll(model, blocks, ()).mean()
    loss = {
        (layer, expert): token_nll(model, blocks, [(layer, expert)]).mean() - whole
        for layer in range(LAYERS)
        for expert in range(EXPERTS)
    }
    may_go = set(loss)
    gone: list[Pair] = []
    for number in range(rounds):
        for layer in range(LAYERS):
            gone.append(min((p for p in may_go if p[0] == layer), key=lambda p: loss[p]))
        if number == rounds - 1:
            break
        whole = token_nll(model, blocks, gone).mean()
        may_go = set()
        for layer in range(LAYERS):
            left = sorted(
                (p for p in loss if p[0] == layer and p not in gone), key=loss.__getitem__
            )
            may_go |= set(left[:candidates])
        for pair in may_go:
            loss[pair] = token_nll(model, blocks, [*gone, pair]).mean() - whole
    order = [[e for layer, e in gone if layer == of] for of in range(LAYERS)]
    return [(ids, set(range(EXPERTS)) - set(ids)) for ids in order]


@pytest.mark.parametrize(("rounds", "candidates"), [(6, 8), (5, 2), (1, 3)])
def test_greedy_is_the_naive_one(
    engine: TransformersEngine,
    eager: Any,
    blocks: Blocks,
    alone: ExpertScores,
    rounds: int,
    candidates: int,
) -> None:
    found = greedy(engine, blocks, alone, rounds, candidates, nothing)
    assert np.array_equal(np.sort(found.score_LE), [range(EXPERTS)] * LAYERS)
    assert np.array_equal(found.pack_mass_PLE, alone.pack_mass_PLE)
    for layer, (order, stay) in enumerate(naive_greedy(eager, blocks, rounds, candidates)):
        ranked = np.argsort(found.score_LE[layer]).tolist()
        assert ranked[:rounds] == order
        assert set(ranked[rounds:]) == stay


def test_greedy_breaks_ties_as_plans_do(engine: TransformersEngine, blocks: Blocks) -> None:
    equal = ExpertScores(
        np.zeros((LAYERS, EXPERTS)),
        np.zeros((LAYERS, EXPERTS)),
        np.zeros((LAYERS, EXPERTS), np.int64),
        {},
        np.zeros((1, LAYERS, EXPERTS)),
    )
    found = greedy(engine, blocks, equal, 1, 1, nothing)
    assert found.score_LE.tolist() == [list(range(EXPERTS))[::-1]] * LAYERS


def test_layer_losses_are_those_of_one_cut_layer(
    engine: TransformersEngine, eager: Any, blocks: Blocks
) -> None:
    plans = {
        2: KeepPlan(((0, 5), (3, 4)), EXPERTS),
        5: KeepPlan(((0, 1, 2, 3, 5), (2, 3, 4, 5, 6)), EXPERTS),
        8: KeepPlan((tuple(range(8)),) * 2, EXPERTS),
    }
    found = layer_losses(engine, blocks, plans, nothing)
    assert found.sizes == (2, 5, 8)
    whole = token_nll(eager, blocks, ()).mean()
    for layer, (column, size) in itertools.product(range(LAYERS), enumerate(found.sizes)):
        dropped = [(layer, e) for e in range(EXPERTS) if e not in plans[size].kept[layer]]
        change = token_nll(eager, blocks, dropped).mean() - whole
        assert found.loss_LN[layer, column] == pytest.approx(change, abs=2e-5)
    assert (found.loss_LN[:, 2] == 0).all()


def test_stopping_leaves_the_plan_and_saves_tokens_where_experts_are_far_apart(
    tmp_path: Path, load: Callable[..., TransformersEngine], make_blocks: Callable[..., Blocks]
) -> None:
    """Four experts a layer do all the work, on text that the model itself finds likeliest."""
    path = tiny.write_checkpoint(tmp_path / "m", seed=3)
    weights = tiny.tensors(tiny.config(), 3)
    for name, array in weights.items():
        if name.endswith("router.bias"):
            array[:] = [50, -50, 50, -50, -50, 50, -50, 50]
    tiny.write_weights(path, weights, 2)
    model, made = tiny.eager_model(path), make_blocks(64, 16, share=0.9)
    ids = torch.from_numpy(made.ids_BS).long()
    for t in range(2, 16):
        with torch.no_grad():
            ids[:, t] = model(ids[:, :t]).logits[:, -1].argmax(-1)
    made.ids_BS[:] = ids.numpy()
    made.scored_BS[:, 1] = False
    engine = load(path)
    spent: dict[str, list[int]] = {"all": [], "raced": []}
    every = leave_one_out(engine, made, None, spent["all"].append)
    raced = leave_one_out(engine, made, Stop(4, 0.95), spent["raced"].append)
    for scores in (every, raced):
        best = np.argsort(-scores.score_LE, axis=1)[:, :4]
        assert np.array_equal(np.sort(best), [[0, 2, 5, 7]] * LAYERS)
    assert sum(spent["all"]) == (1 + LAYERS * EXPERTS) * made.ids_BS.size
    assert sum(spent["raced"]) <= sum(spent["all"]) / 2
    assert np.array_equal(every.count_LE[:, [1, 3, 4, 6]], np.zeros((LAYERS, 4)))


def test_without_a_sure_place_every_expert_is_measured_on_all_blocks(
    engine: TransformersEngine, make_blocks: Callable[..., Blocks]
) -> None:
    made = make_blocks(8, 16)
    every = leave_one_out(engine, made, None, nothing)
    raced = leave_one_out(engine, made, Stop(4, 1 - 1e-12), nothing)
    np.testing.assert_allclose(raced.score_LE, every.score_LE, atol=2e-5)
    assert np.array_equal(raced.count_LE, every.count_LE)


@given(
    st.integers(1, 4).flatmap(
        lambda sizes: st.tuples(
            st.permutations(range(1, 7)).map(lambda ids: tuple(sorted(ids[:sizes]))),
            st.lists(
                st.lists(st.integers(-3, 6), min_size=sizes, max_size=sizes),
                min_size=1,
                max_size=4,
            ),
        )
    ),
    st.integers(1, 24),
)
def test_sizes_are_the_cheapest_of_all_allocations(
    case: tuple[tuple[int, ...], list[list[int]]], total: int
) -> None:
    sizes, losses = case
    asked = LayerLosses(sizes, np.array(losses, float))
    possible = [
        sum(loss[i] for loss, i in zip(losses, chosen, strict=True))
        for chosen in itertools.product(range(len(sizes)), repeat=len(losses))
        if sum(sizes[i] for i in chosen) == total
    ]
    if not possible:
        with pytest.raises(UserError, match="do not fit"):
            cheapest(asked, total)
        return
    found = cheapest(asked, total)
    assert sum(found) == total
    cost = sum(loss[sizes.index(n)] for loss, n in zip(losses, found, strict=True))
    assert cost == min(possible)


SMALL = ("marginal.num_blocks=4", "marginal.seq_len=32", "pruning.keep_n=4")


def test_the_pipeline_cuts_by_measured_losses(world: World) -> None:
    """leave_one_out, then greedy and sizes by marginal loss, which find its first pass."""
    first = world.run("pruning=leave_one_out", *SMALL, "eval.candidates=[masked]").result
    stages = {stage["stage"]: stage for stage in first["stages"]}
    assert "profile" not in stages
    facts = stages["marginal/leave_one_out"]["facts"]
    assert facts["tokens"] == facts["tokens_at_most"] == (1 + 16) * 4 * 32
    assert [len(ids) for ids in first["plan"]["kept"]] == [4, 4]
    second = world.run("task=profile", "pruning=greedy", "marginal.candidates=2", *SMALL).result
    again = {stage["stage"]: stage for stage in second["stages"]}
    assert again["marginal/leave_one_out"]["cached"]
    assert again["marginal/greedy"]["facts"]["tokens"] == 3 * (1 + 2 * 2) * 4 * 32
    ragged = world.run(
        "task=profile", "pruning=leave_one_out", "pruning.selection=marginal_loss",
        "pruning.keep_multiple=1", "pruning.min_keep_n=3", "pruning.max_keep_n=6", *SMALL,
    ).result  # fmt: skip
    layers = {stage["stage"]: stage for stage in ragged["stages"]}["marginal/layers"]
    assert layers["facts"]["tokens"] == (1 + 2 * 4) * 4 * 32
    assert sum(len(ids) for ids in ragged["plan"]["kept"]) == 8


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["task=ablate", "pruning=greedy"], ["pruning.saliency = 'greedy'", "task=ablate"]),
        (
            [
                "pruning.selection=marginal_loss",
                "profile.early_stop=true",
                "export.pad_ragged=true",
            ],
            ["pruning.selection = 'marginal_loss'", "profile.early_stop"],
        ),
        (["pruning=leave_one_out", "pruning.weight=eaft"], ["pruning.weight", "uniform"]),
        (
            ["pruning=leave_one_out", "pruning.pack_weights={tool_agentic: 2}"],
            ["pruning.pack_weights", "no effect"],
        ),
        (["marginal.early_stop=true"], ["marginal.early_stop", "leave_one_out"]),
        (
            ["pruning=leave_one_out", "marginal.early_stop=true", "pruning.core_count_top_m=1"],
            ["marginal.early_stop", "no core"],
        ),
        (
            ["pruning=leave_one_out", "marginal.early_stop=true", "marginal.seed=null"],
            ["marginal.seed"],
        ),
    ],
)
def test_settings_without_effect_are_refused(overrides: list[str], said: list[str]) -> None:
    with pytest.raises(UserError) as error:
        check(overrides)
    assert all(word in str(error.value) for word in said), error.value


def test_files_beside_a_checkpoint_give_its_plan_again(world: World) -> None:
    made = world.run("task=prune", "pruning=leave_one_out", "marginal.seed=5", *SMALL).result
    home = Path(made["checkpoint"]["path"])
    again = world.run("task=profile", f"recipe={home / 'reap-recipe.yaml'}").result
    assert again["plan"]["digest"] == made["plan"]["digest"]
    assert all(stage["cached"] for stage in again["stages"])
    cut = world.run("task=plan", f"scores={home / 'reap-scores.yaml'}", "pruning.keep_n=4").result
    assert cut["plan"]["digest"] == made["plan"]["digest"]


def test_more_rounds_than_a_layer_can_lose_are_refused(world: World) -> None:
    error = world.run("task=profile", "pruning=greedy", "marginal.rounds=7", *SMALL).failed()
    assert "marginal.rounds = 7" in error
    assert "at most 6" in error


def test_sizes_by_measured_losses_need_the_losses(alone: ExpertScores) -> None:
    asked = check(["pruning.selection=marginal_loss", "export.pad_ragged=true"]).experiments[0]
    with pytest.raises(UserError, match="selection = 'marginal_loss' measures the model"):
        plan(asked.pruning, alone)
