"""The engine against transformers' own eager forward, and a trace against a float64 loop."""

from __future__ import annotations

import gc
import json
import math
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from support import tiny
from support.engines import options

from eaft_prune.checkpoints.read import open_model
from eaft_prune.config import PruningSettings, RuntimeSettings
from eaft_prune.core.types import Blocks, KeepPlan, TokenScores, Trace, UserError
from eaft_prune.stages.score import score as score_experts

if TYPE_CHECKING:
    from eaft_prune.engines.transformers import TransformersEngine

Load = Callable[..., "TransformersEngine"]
Make = Callable[..., Blocks]
WINDOW = 16


def nothing(done: int) -> None:
    pass


def oracle(
    model: Any, blocks: Blocks, top: int = 20
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """log p and H of the scored tokens, one token at a time in float64, from eager logits."""
    logp, entropy = [], []
    for b in range(len(blocks)):
        with torch.no_grad():
            logits = model(torch.from_numpy(blocks.ids_BS[b : b + 1]).long()).logits[0]
        for t in np.flatnonzero(blocks.scored_BS[b]):
            row = logits[t - 1].double().numpy()
            p = np.exp(row - row.max())
            p /= p.sum()
            logp.append(math.log(p[blocks.ids_BS[b, t]]))
            q = np.sort(p)[::-1][:top]
            q = q / q.sum()
            entropy.append(-sum(x * math.log(x) for x in q if x > 0) / math.log(top))
    return np.array(logp), np.array(entropy)


def agree(scores: TokenScores, model: Any, blocks: Blocks) -> None:
    logp, entropy = oracle(model, blocks)
    assert len(scores) == len(logp)
    # 5e-6: the random models say ln p = -20, where float32 sums leave 1e-6 of it
    np.testing.assert_allclose(scores.logp_T, logp, atol=2e-5, rtol=5e-6)
    np.testing.assert_allclose(scores.entropy_T, entropy, atol=2e-5, rtol=0)
    assert scores.block_T.tolist() == [int(b) for b, _ in np.argwhere(blocks.scored_BS)]


@pytest.fixture(scope="module")
def eager(checkpoint: Path) -> Any:
    return tiny.eager_model(checkpoint).requires_grad_(False)


@pytest.mark.parametrize("seq_len", [2, 5, 15, 16, 17, 31, 32, 33, 48, 71])
def test_scores_are_those_of_eager_at_every_length(
    engine: TransformersEngine, eager: Any, make_blocks: Make, seq_len: int
) -> None:
    """Below, at, above and off the multiples of the sliding window of 16."""
    blocks = make_blocks(3, seq_len)
    agree(engine.score(blocks, nothing), eager, blocks)


@pytest.mark.parametrize(
    "changes",
    [
        {"quantization_config": None},
        {"num_hidden_layers": 4, "sliding_window": 8, "num_key_value_heads": 1},
        {"num_experts_per_tok": 4, "num_local_experts": 6, "num_key_value_heads": 4},
        {"num_experts_per_tok": 8},
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 150000.0,
                "factor": 32.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 32,
            }
        },
    ],
    ids=["unquantised", "four layers", "no groups", "all experts", "yarn"],
)
def test_scores_are_those_of_eager_in_other_shapes(
    tmp_path: Path, load: Load, make_blocks: Make, changes: dict[str, Any]
) -> None:
    path = tiny.write_checkpoint(tmp_path / "m", seed=8, **changes)
    blocks = make_blocks(2, 45)
    agree(load(path).score(blocks, nothing), tiny.eager_model(path), blocks)


def test_large_sinks_and_clamped_activations_agree(
    tmp_path: Path, load: Load, make_blocks: Make
) -> None:
    """Sinks that take most of the attention, and inputs beyond swiglu_limit."""
    path = tiny.write_checkpoint(tmp_path / "m", seed=9, swiglu_limit=0.5)
    weights = tiny.tensors(tiny.config(), 9)
    for name, array in weights.items():
        if name.endswith("sinks"):
            array[:] = [8.0, -8.0, 3.0, 0.0]
    tiny.write_weights(path, weights, 2)
    blocks = make_blocks(2, 40)
    agree(load(path).score(blocks, nothing), tiny.eager_model(path), blocks)


def test_a_value_reaches_the_window_and_no_further() -> None:
    from eaft_prune.engines.attention import sink_attention

    rng = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 40, 8, generator=rng) for _ in range(3))
    moved = value.clone()
    moved[:, :, 10] += 100
    arguments = {"attention_mask": None, "scaling": 0.3, "s_aux": torch.zeros(2)}
    for window, last in ((WINDOW, 10 + WINDOW - 1), (None, 39)):
        a, b = (
            sink_attention(torch.nn.Module(), query, key, v, sliding_window=window, **arguments)[0]
            for v in (value, moved)
        )
        changed = np.flatnonzero((a != b).any(dim=-1).any(dim=-1)[0].numpy())
        assert changed.tolist() == list(range(10, last + 1))


def naive_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    window: int | None,
    sinks: torch.Tensor,
) -> torch.Tensor:
    batch, heads, length, dim = query.shape
    out = torch.zeros(batch, length, heads, dim, dtype=torch.float64)
    group = heads // key.shape[1]
    for b in range(batch):
        for h in range(heads):
            for i in range(length):
                first = 0 if window is None else max(0, i - window + 1)
                k, v = (x[b, h // group, first : i + 1].double() for x in (key, value))
                scores = (k @ query[b, h, i].double()) * scaling
                weights = torch.softmax(torch.cat([scores, sinks[h : h + 1].double()]), 0)[:-1]
                out[b, i, h] = weights @ v
    return out


@pytest.mark.parametrize("window", [None, 1, 4, 7, 13, 50])
@pytest.mark.parametrize("length", [1, 4, 13, 20])
def test_attention_is_the_naive_loop(length: int, window: int | None) -> None:
    from eaft_prune.engines.attention import sink_attention

    rng = torch.Generator().manual_seed(length)
    query = torch.randn(2, 4, length, 8, generator=rng)
    key, value = (torch.randn(2, 2, length, 8, generator=rng) for _ in range(2))
    sinks = torch.tensor([0.0, 3.0, -30.0, 30.0])
    out, _ = sink_attention(
        torch.nn.Module(), query, key, value, None, 0.35, sliding_window=window, s_aux=sinks
    )
    expected = naive_attention(query, key, value, 0.35, window, sinks)
    np.testing.assert_allclose(out.numpy(), expected.numpy(), atol=2e-6)


def test_a_mask_is_refused() -> None:
    from eaft_prune.engines.attention import sink_attention

    x = torch.zeros(1, 1, 2, 4)
    with pytest.raises(ValueError, match="mask"):
        sink_attention(torch.nn.Module(), x, x, x, torch.zeros(1, 1, 2, 2), 1.0)


def test_scores_do_not_depend_on_the_batch_size(
    checkpoint: Path, load: Load, make_blocks: Make
) -> None:
    blocks = make_blocks(5, 33)
    one, all_at_once = (
        load(checkpoint, batch_tokens=tokens).score(blocks, nothing) for tokens in (1, 10_000)
    )
    np.testing.assert_allclose(one.logp_T, all_at_once.logp_T, atol=2e-5, rtol=0)
    np.testing.assert_allclose(one.entropy_T, all_at_once.entropy_T, atol=2e-5, rtol=0)
    assert np.array_equal(one.block_T, all_at_once.block_T)


def test_blocks_without_scored_tokens_are_passed_over(
    checkpoint: Path, load: Load, make_blocks: Make
) -> None:
    blocks = make_blocks(4, 20)
    few = blocks.scored_BS.copy()
    few[[0, 2]] = False
    engine = load(checkpoint, batch_tokens=20)
    sparse = Blocks(**{**vars(blocks), "scored_BS": few})
    scores = engine.score(sparse, nothing)
    whole = engine.score(blocks, nothing)
    assert set(scores.block_T.tolist()) == {1, 3}
    assert np.array_equal(scores.logp_T, whole.logp_T[np.isin(whole.block_T, [1, 3])])
    trace = engine.trace(sparse, nothing)
    assert len(trace) == len(scores)


def test_blocks_do_not_see_each_other(engine: TransformersEngine, make_blocks: Make) -> None:
    blocks = make_blocks(3, 24)
    ids = blocks.ids_BS.copy()
    ids[1] = (ids[1] + 7) % 300
    changed = engine.score(Blocks(**{**vars(blocks), "ids_BS": ids}), nothing)
    before = engine.score(blocks, nothing)
    others = before.block_T != 1
    np.testing.assert_allclose(changed.logp_T[others], before.logp_T[others], atol=2e-5)
    assert not np.allclose(changed.logp_T[~others], before.logp_T[~others], atol=1e-2)


def test_progress_counts_every_token_once(engine: TransformersEngine, make_blocks: Make) -> None:
    for method in (engine.score, engine.trace):
        done: list[int] = []
        method(make_blocks(5, 24), done.append)
        assert sum(done) == 5 * 24


def test_two_runs_are_equal_bit_by_bit(
    checkpoint: Path, engine: TransformersEngine, load: Load, make_blocks: Make
) -> None:
    blocks = make_blocks(3, 40)
    first, second, reloaded = (e.trace(blocks, nothing) for e in (engine, engine, load(checkpoint)))
    for other in (second, reloaded):
        for name in ("experts_TLK", "weights_TLK", "norms_TLK", "pack_T", "row_T"):
            assert np.array_equal(getattr(first, name), getattr(other, name)), name
        assert np.array_equal(first.scores.logp_T, other.scores.logp_T)
        assert np.array_equal(first.scores.entropy_T, other.scores.entropy_T)


def test_tracing_changes_no_score(engine: TransformersEngine, make_blocks: Make) -> None:
    blocks = make_blocks(4, 30)
    before = engine.score(blocks, nothing)
    traced = engine.trace(blocks, nothing).scores
    after = engine.score(blocks, nothing)
    for scores in (traced, after):
        assert np.array_equal(scores.logp_T, before.logp_T)
        assert np.array_equal(scores.entropy_T, before.entropy_T)


Call = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def eager_routing(model: Any, blocks: Blocks) -> list[list[Call]]:
    """Per block and layer what reached the eager experts: hidden states, ids, gates."""
    calls: list[Call] = []

    def hook(module: Any, args: Any, kwargs: Any) -> None:
        calls.append((*args, *kwargs.values()))

    experts = [layer.mlp.experts for layer in model.model.layers]
    handles = [m.register_forward_pre_hook(hook, with_kwargs=True) for m in experts]
    per_block = []
    try:
        for row in blocks.ids_BS:
            calls.clear()
            with torch.no_grad():
                model(torch.from_numpy(row[None]).long())
            per_block.append(list(calls))
    finally:
        for handle in handles:
            handle.remove()
    return per_block


def naive_norm(module: Any, expert: int, x: torch.Tensor) -> float:
    """||f_j(x)|| in float64, from the definition of a gpt-oss expert."""
    x = x.double()
    up = x @ module.gate_up_proj[expert].double() + module.gate_up_proj_bias[expert].double()
    gate, linear = up[0::2].clamp(max=7.0), up[1::2].clamp(-7.0, 7.0)
    inner = (linear + 1) * gate * torch.sigmoid(1.702 * gate)
    out = inner @ module.down_proj[expert].double() + module.down_proj_bias[expert].double()
    return float(out.norm())


@pytest.mark.parametrize("seq_len", [20, 33])
def test_the_trace_is_the_eager_routing_at_predictor_positions(
    engine: TransformersEngine, eager: Any, make_blocks: Make, seq_len: int
) -> None:
    blocks = make_blocks(2, seq_len)
    trace = engine.trace(blocks, nothing)
    routing = eager_routing(eager, blocks)
    scored = np.argwhere(blocks.scored_BS)
    assert len(trace) == len(scored)
    assert (trace.n_layers, trace.top_k, trace.n_experts) == (2, 2, 8)
    for index, (b, t) in enumerate(scored):
        for layer in range(2):
            hidden, ids, gates = (x[t - 1] for x in routing[b][layer])
            module = eager.model.layers[layer].mlp.experts
            assert trace.experts_TLK[index, layer].tolist() == ids.tolist()
            np.testing.assert_allclose(trace.weights_TLK[index, layer], gates.numpy(), atol=2e-5)
            norms = [naive_norm(module, int(j), hidden) for j in ids]
            np.testing.assert_allclose(trace.norms_TLK[index, layer], norms, rtol=2e-4)
        assert trace.row_T[index] == blocks.row_BS[b, t]
        assert trace.pack_T[index] == blocks.row_packs[blocks.row_BS[b, t]]
    assert trace.packs == blocks.packs


def test_the_trace_does_not_depend_on_the_batch_size(
    checkpoint: Path, load: Load, make_blocks: Make
) -> None:
    blocks = make_blocks(5, 21)
    small, large = (
        load(checkpoint, batch_tokens=tokens).trace(blocks, nothing) for tokens in (42, 999)
    )
    assert np.array_equal(small.experts_TLK, large.experts_TLK)
    np.testing.assert_allclose(small.weights_TLK, large.weights_TLK, atol=2e-5)
    np.testing.assert_allclose(small.norms_TLK, large.norms_TLK, rtol=2e-4)


def test_a_recorder_does_not_outlive_an_interrupted_trace(
    engine: TransformersEngine, make_blocks: Make
) -> None:
    def interrupt(done: int) -> None:
        raise KeyboardInterrupt

    blocks = make_blocks(2, 20)
    with pytest.raises(KeyboardInterrupt):
        engine.trace(blocks, interrupt)
    assert not any(hasattr(m, "eaft_recorder") for m in engine.model.modules())
    first, second = engine.trace(blocks, nothing), engine.trace(blocks, nothing)
    assert np.array_equal(first.norms_TLK, second.norms_TLK)


@pytest.fixture(scope="module")
def permuted(
    checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[list[int]]]:
    """The same model with the experts of each layer in another order; new expert i is old p[i]."""
    path = Path(shutil.copytree(checkpoint, tmp_path_factory.mktemp("permuted") / "m"))
    weights = tiny.tensors(json.loads((path / "config.json").read_text()), 0)
    orders = [np.random.default_rng(layer).permutation(8).tolist() for layer in range(2)]
    for name in weights:
        if ".mlp." in name:
            weights[name] = weights[name][orders[int(name.split(".")[2])]]
    tiny.write_weights(path, weights, 2)
    return path, orders


def traces(
    engine: TransformersEngine,
    load: Load,
    make_blocks: Make,
    permuted: tuple[Path, list[list[int]]],
) -> tuple[Trace, Trace, list[list[int]]]:
    path, orders = permuted
    blocks = make_blocks(3, 40)
    return engine.trace(blocks, nothing), load(path).trace(blocks, nothing), orders


def test_the_order_of_experts_is_no_part_of_the_model(
    engine: TransformersEngine,
    load: Load,
    make_blocks: Make,
    permuted: tuple[Path, list[list[int]]],
) -> None:
    before, after, orders = traces(engine, load, make_blocks, permuted)
    np.testing.assert_allclose(after.scores.logp_T, before.scores.logp_T, atol=2e-5, rtol=0)
    for layer, order in enumerate(orders):
        assert np.array_equal(
            np.array(order)[after.experts_TLK[:, layer]], before.experts_TLK[:, layer]
        )


@pytest.mark.parametrize("saliency", ["one", "gate", "norm", "gate_norm"])
@pytest.mark.parametrize("weight", ["uniform", "eaft"])
def test_permuting_experts_permutes_scores(
    engine: TransformersEngine,
    load: Load,
    make_blocks: Make,
    permuted: tuple[Path, list[list[int]]],
    saliency: Any,
    weight: Any,
) -> None:
    before, after, orders = traces(engine, load, make_blocks, permuted)
    settings = PruningSettings(
        name="x", keep_n=4, saliency=saliency, weight=weight, reduce="mean", regions="strict"
    )
    old, new = score_experts(settings, before), score_experts(settings, after)
    for layer, order in enumerate(orders):
        np.testing.assert_allclose(new.score_LE[layer], old.score_LE[layer][order], rtol=1e-4)
        assert np.array_equal(new.count_LE[layer], old.count_LE[layer][order])


def test_bfloat16_runs_and_is_close(
    checkpoint: Path, engine: TransformersEngine, load: Load, make_blocks: Make
) -> None:
    blocks = make_blocks(4, 40)
    narrow = load(checkpoint, dtype="bfloat16")
    wide, scores = engine.score(blocks, nothing), narrow.score(blocks, nothing)
    assert next(narrow.model.parameters()).dtype == torch.bfloat16
    assert scores.logp_T.dtype == scores.entropy_T.dtype == np.float32
    gap = np.abs(scores.logp_T - wide.logp_T)
    assert 1e-4 < gap.mean() < 0.15  # really narrower, and still the same model
    assert np.abs(scores.entropy_T - wide.entropy_T).mean() < 0.05
    trace = narrow.trace(blocks, nothing)
    assert trace.weights_TLK.dtype == trace.norms_TLK.dtype == np.float32
    np.testing.assert_allclose(trace.weights_TLK.sum(axis=2), 1, atol=0.02)


@pytest.mark.parametrize("memory_gb", [None, 1e-4])
def test_an_engine_that_is_let_go_of_is_freed(
    checkpoint: Path, load: Load, make_blocks: Make, memory_gb: float | None
) -> None:
    """By its reference count: the next model is loaded at once, and two may not fit."""
    engine = load(checkpoint, memory_gb=memory_gb)
    blocks = make_blocks(2, 32)
    with engine.masked(KeepPlan(((0, 1, 2, 3),) * 2, engine.n_experts)):
        engine.trace(blocks, lambda _: None)
    gone = [weakref.ref(tensor) for tensor in engine.model.parameters()]
    gc.disable()
    try:
        del engine
        assert not any(tensor() is not None for tensor in gone)
    finally:
        gc.enable()


def test_conditions_say_what_the_numbers_depend_on(
    checkpoint: Path, engine: TransformersEngine, load: Load
) -> None:
    other = load(checkpoint, dtype="bfloat16", batch_tokens=99)
    assert set(engine.conditions) == {"engine", "dtype", "top_k", "entropy_top_k"}
    assert {k for k, v in engine.conditions.items() if other.conditions[k] != v} == {"dtype"}


def test_weights_that_give_nan_are_one_error(tmp_path: Path, load: Load, make_blocks: Make) -> None:
    path = tiny.write_checkpoint(tmp_path / "m")
    weights = tiny.tensors(tiny.config(), 0)
    weights["model.norm.weight"][:] = np.inf
    tiny.write_weights(path, weights, 2)
    with pytest.raises(UserError, match="NaN"):
        load(path).score(make_blocks(1, 20), nothing)


def test_a_device_the_machine_lacks_is_named() -> None:
    from eaft_prune.engines.loading import resolve_device

    runtime = {"batch_tokens": 1, "store_dir": "s", "checkpoint_dir": "c"}
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="cuda"):
            resolve_device(RuntimeSettings(device="cuda", **runtime))


def test_the_likeliest_tokens_are_those_of_transformers(
    engine: TransformersEngine, make_blocks: Make
) -> None:
    blocks = make_blocks(2, 24)
    scores, kept = engine.likeliest(blocks, 30, nothing)
    plain = engine.score(blocks, nothing)
    np.testing.assert_array_equal(scores.logp_T, plain.logp_T)
    np.testing.assert_array_equal(scores.entropy_T, plain.entropy_T)
    exact = exact_logp(engine, blocks).topk(30)
    np.testing.assert_allclose(kept.logp_TK, exact.values, rtol=2**-11, atol=1e-5)
    rest = torch.log1p(-exact.values.exp().sum(-1))
    np.testing.assert_allclose(kept.rest_T, rest, rtol=2**-9)
    assert np.mean(kept.ids_TK == exact.indices.numpy()) > 0.999  # near ties may swap
    assert kept.ids_TK.dtype == np.uint16


def test_divergence_is_that_of_transformers_distributions(
    engine: TransformersEngine, make_blocks: Make
) -> None:
    blocks = make_blocks(3, 24)
    _, kept = engine.likeliest(blocks, 400, nothing)  # more than there are: every token is a class
    plan = KeepPlan(((0, 1, 2, 3),) * 2, 8)
    base, some = exact_logp(engine, blocks), engine.likeliest(blocks, 5, nothing)[1]
    with engine.masked(plan):
        exact = exact_logp(engine, blocks)
        scores, whole = engine.diverge(blocks, kept, nothing)
        _, merged = engine.diverge(blocks, some, nothing)
        alone = engine.score(blocks, nothing)
    kl_T = (base.exp() * (base - exact)).sum(-1).numpy()
    assert kl_T.mean() > 1e-3
    np.testing.assert_allclose(whole.kl_T, kl_T, rtol=0.02, atol=1e-5)
    assert (merged.kl_T <= kl_T * 1.02 + 1e-5).all()  # a lower bound, up to rounding
    assert 0 < merged.kl_T.mean() < 0.9 * kl_T.mean()
    same = (base.argmax(-1) == exact.argmax(-1)).numpy()
    np.testing.assert_array_equal(whole.same_top_T, same)
    np.testing.assert_array_equal(merged.same_top_T, same)
    np.testing.assert_array_equal(scores.logp_T, alone.logp_T)
    np.testing.assert_array_equal(scores.entropy_T, alone.entropy_T)
    _, itself = engine.diverge(blocks, some, nothing)
    assert not itself.kl_T.any()
    assert itself.same_top_T.all()


def exact_logp(engine: TransformersEngine, blocks: Blocks) -> torch.Tensor:
    """ln p of the whole vocabulary at every scored token, of transformers' own head, float64."""
    with torch.inference_mode():
        logits = engine.model(torch.from_numpy(blocks.ids_BS).long()).logits.double()
    return torch.log_softmax(logits[:, :-1][torch.from_numpy(blocks.scored_BS[:, 1:])], -1)


def test_an_entropy_over_more_than_the_vocabulary_is_refused(checkpoint: Path) -> None:
    from eaft_prune.engines.loading import load_files

    files = open_model(checkpoint)
    with pytest.raises(UserError, match="entropy_top_k = 301"):
        load_files(files, options(device="cpu", batch_tokens=1, entropy_top_k=301))


def test_transformers_own_kernels_are_refused_on_a_cpu(checkpoint: Path) -> None:
    from eaft_prune.engines.loading import load_files

    with pytest.raises(UserError, match=r"engine\.experts = 'kernels' needs a CUDA device"):
        load_files(open_model(checkpoint), options(device="cpu", experts="kernels"))


def test_expert_math_finds_no_gap_and_would_find_one(
    engine: TransformersEngine, make_blocks: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    from eaft_prune.checks.expert_math import expert_math
    from eaft_prune.engines import experts

    blocks = make_blocks(1, 40)
    errors = {k: v for k, v in expert_math(engine, blocks).items() if isinstance(v, float)}
    assert len(errors) == 6
    assert max(errors.values()) < 1e-5
    true = experts.experts_forward
    monkeypatch.setattr(experts, "experts_forward", lambda *args: 1.01 * true(*args))
    wrong = expert_math(engine, blocks)
    for layer in range(2):
        assert wrong[f"layer{layer}_eager"] == pytest.approx(0.01, rel=0.01)
        assert wrong[f"layer{layer}_float64"] == pytest.approx(0.01, rel=0.01)


def family_experts(kind: str) -> Any:
    """Experts of other families as transformers has them: no biases, weights [out, in]."""
    if kind == "mixtral":
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts

        config = MixtralConfig(hidden_size=24, intermediate_size=40, num_local_experts=6)
        return MixtralExperts(config), config
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = Qwen3MoeConfig(hidden_size=24, moe_intermediate_size=40, num_experts=6)
    return Qwen3MoeExperts(config), config


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_experts_of_other_families_run_as_in_eager(kind: str) -> None:
    from eaft_prune.engines.experts import experts_forward

    module, config = family_experts(kind)
    config._experts_implementation = "eager"
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng) * 0.2)
        hidden = torch.randn(30, 24, generator=rng)
        gates, ids = torch.rand(30, 5, generator=rng).topk(2)  # expert 5 is never chosen
        eager = module(hidden, ids, gates)
        ours = experts_forward(module, hidden, ids, gates)
    np.testing.assert_allclose(ours.numpy(), eager.numpy(), atol=2e-6, rtol=2e-5)
    assert float(eager.abs().mean()) > 0.01
