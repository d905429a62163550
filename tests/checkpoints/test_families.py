"""gpt-oss: its tensor table is the model's, and masking experts is removing them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from support import tiny
from support.engines import evaluate_masked

from eaft_prune.checkpoints.cut import cut, router_biases
from eaft_prune.checkpoints.families import family_of
from eaft_prune.checkpoints.families.base import Table, with_table
from eaft_prune.checkpoints.families.gpt_oss import tensor_table
from eaft_prune.checkpoints.pad import padded
from eaft_prune.checkpoints.read import ModelFiles, open_model
from eaft_prune.core.types import Blocks, KeepPlan, UserError
from eaft_prune.stages.export import Target, export

if TYPE_CHECKING:
    from eaft_prune.engines.transformers import TransformersEngine

Load = Callable[..., "TransformersEngine"]

# config.json of openai/gpt-oss-20b, as far as shapes depend on it
GPT_OSS_20B: dict[str, Any] = {
    "model_type": "gpt_oss",
    "attention_bias": True,
    "head_dim": 64,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "tie_word_embeddings": False,
    "vocab_size": 201088,
    "quantization_config": {"quant_method": "mxfp4"},
}


def nothing(done: int) -> None:
    pass


def random_plan(seed: int, keep: int, experts: int = 8, layers: int = 2) -> KeepPlan:
    rng = np.random.default_rng(seed)
    kept = tuple(
        tuple(sorted(int(i) for i in rng.permutation(experts)[:keep])) for _ in range(layers)
    )
    return KeepPlan(kept, experts)


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_the_table_is_the_models_state_dict(bias: bool, tie: bool) -> None:
    from transformers import GptOssConfig, GptOssForCausalLM

    config = tiny.config(quantization_config=None, attention_bias=bias, tie_word_embeddings=tie)
    with torch.device("meta"):
        model = GptOssForCausalLM(GptOssConfig(**config))
    state = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if tie:
        del state["lm_head.weight"]  # saved once, as the embedding
    table = tensor_table(config)
    assert {name: spec.shape for name, spec in table.items()} == state


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("quantized", [True, False])
def test_the_table_is_what_a_checkpoint_holds(tmp_path: Path, dtype: str, quantized: bool) -> None:
    changes = {} if quantized else {"quantization_config": None}
    model = open_model(tiny.write_checkpoint(tmp_path / "m", dtype=dtype, **changes))
    family = family_of(model.config)
    family.table(model)
    table = tensor_table(model.config)
    assert {n: spec.shape for n, spec in table.items()} == {
        n: entry.shape for n, entry in model.tensors.items()
    }


def test_a_table_is_made_once(checkpoint: Path) -> None:
    """It takes seconds for a large model, and follows from files that do not change."""

    def refuse(files: ModelFiles) -> Table:
        raise AssertionError("the table is made again")

    files, plan = open_model(checkpoint), KeepPlan(((0, 3, 5),) * 2, 8)
    family = family_of(files.config)
    once, known = with_table(family, files), replace(family, table=refuse)
    assert cut(known, once, plan) == cut(family, files, plan)
    assert router_biases(known, once) == router_biases(family, files) is not None
    assert cut(family, once, plan).files.table is None  # fewer experts are another table


def test_the_table_of_gpt_oss_20b_adds_up_to_its_published_size() -> None:
    """13,761,264,768 bytes: `total_size` in the index of openai/gpt-oss-20b."""
    family = family_of(GPT_OSS_20B)
    table = tensor_table(GPT_OSS_20B)
    size = sum(
        int(np.prod(spec.shape, dtype=np.int64)) * (1 if spec.dtype == "U8" else 2)
        for spec in table.values()
    )
    assert size == 13_761_264_768
    assert (family.n_layers(GPT_OSS_20B), family.n_experts(GPT_OSS_20B)) == (24, 32)
    assert family.top_k(GPT_OSS_20B) == 4


def test_exactly_routers_and_experts_have_an_expert_axis() -> None:
    config = tiny.config(num_local_experts=7)  # 7 is the leading dimension of nothing else
    for name, spec in tensor_table(config).items():
        assert (spec.axis == 0) == (".mlp." in name) == (spec.shape[0] == 7), name


def test_an_unknown_model_type_is_named() -> None:
    with pytest.raises(UserError, match=r"llama.*no experts"):
        family_of({"model_type": "llama"})


@pytest.mark.parametrize(
    "key", ["num_local_experts", "hidden_size", "vocab_size", "num_hidden_layers", "head_dim"]
)
@pytest.mark.parametrize("bad", [None, 0, -1, "8", 8.0, True])
def test_a_config_value_that_is_no_count_is_named(key: str, bad: Any) -> None:
    config = {**tiny.config(), key: bad}
    with pytest.raises(UserError, match=key):
        tensor_table(config)


def test_patching_changes_every_name_of_the_count() -> None:
    """Some exports carry `num_experts` beside `num_local_experts`."""
    config = tiny.config(num_experts=8)
    patched = family_of(config).patch_config(config, 6)
    assert patched == {**config, "num_local_experts": 6, "num_experts": 6}
    assert config["num_local_experts"] == 8


@pytest.fixture(scope="module")
def hard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large router and expert biases: a forgotten or misplaced one cannot hide."""
    path = tmp_path_factory.mktemp("hard") / "base"
    tiny.write_checkpoint(path, seed=5)
    weights = tiny.tensors(tiny.config(), 5)
    rng = np.random.default_rng(6)
    for name, array in weights.items():
        if name.endswith("router.bias"):
            array[:] = rng.normal(0, 8, array.shape)
        elif name.endswith(("gate_up_proj_bias", "down_proj_bias")):
            array[:] = rng.normal(0, 3, array.shape)
    tiny.write_weights(path, weights, 2)
    return path


@pytest.mark.parametrize("keep", [2, 3, 5, 8])
@pytest.mark.parametrize("source", ["checkpoint", "hard"])
def test_masked_is_exported(
    request: pytest.FixtureRequest,
    load: Load,
    make_blocks: Callable[..., Blocks],
    tmp_path: Path,
    source: str,
    keep: int,
) -> None:
    """Dropping experts by router logit and dropping them from the files is the same model."""
    base = request.getfixturevalue(source)
    blocks = make_blocks(3, 40, seed=keep)
    plan = random_plan(seed=keep + 10, keep=keep)
    files = open_model(base)
    how = {"base": {"label": "tiny", "digest": "0"}}
    export(family_of(files.config), files, plan, Target(tmp_path / "out", "k", 10**9, how), nothing)

    masked = evaluate_masked(load(base), blocks, plan, nothing)
    written = load(tmp_path / "out").score(blocks, nothing)
    np.testing.assert_allclose(masked.logp_T, written.logp_T, rtol=1e-5)
    np.testing.assert_allclose(masked.entropy_T, written.entropy_T, rtol=1e-5, atol=1e-6)
    eager = oracle_logp(tiny.eager_model(tmp_path / "out"), blocks)
    np.testing.assert_allclose(masked.logp_T, eager, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("source", ["checkpoint", "hard"])
def test_a_masked_ragged_plan_is_the_padded_export(
    request: pytest.FixtureRequest,
    load: Load,
    make_blocks: Callable[..., Blocks],
    tmp_path: Path,
    source: str,
) -> None:
    """What fills a layer up is in the file and in no token's output; transformers loads it."""
    base = request.getfixturevalue(source)
    blocks = make_blocks(3, 40, seed=1)
    plan = KeepPlan(((1, 4, 6), (0, 2, 3, 5, 7)), 8)
    files = open_model(base)
    how = {"base": {"label": "tiny", "digest": "0"}}
    out = tmp_path / "out"
    export(
        family_of(files.config), files, plan, Target(out, "k", 10**9, how, pad_ragged=True), nothing
    )

    masked = evaluate_masked(load(base), blocks, plan, nothing)
    written = load(out).score(blocks, nothing)
    np.testing.assert_allclose(masked.logp_T, written.logp_T, rtol=1e-5)
    np.testing.assert_allclose(masked.entropy_T, written.entropy_T, rtol=1e-5, atol=1e-6)
    eager = oracle_logp(tiny.eager_model(out), blocks)
    np.testing.assert_allclose(masked.logp_T, eager, atol=2e-5, rtol=2e-5)
    # and the padding would be seen: without its -inf another model is read
    unmuted = evaluate_masked(load(base), blocks, padded(plan), nothing)
    assert np.abs(unmuted.logp_T - masked.logp_T).max() > 1e-3


def oracle_logp(model: Any, blocks: Blocks) -> np.ndarray[Any, Any]:
    with torch.no_grad():
        logits = model(torch.from_numpy(blocks.ids_BS).long()).logits.double()
    logp = torch.log_softmax(logits, -1).numpy()
    return np.array([logp[b, t - 1, blocks.ids_BS[b, t]] for b, t in np.argwhere(blocks.scored_BS)])


@pytest.mark.parametrize("seed", range(3))
def test_masked_routes_like_a_loop_without_the_dropped_experts(
    engine: TransformersEngine, make_blocks: Callable[..., Blocks], seed: int
) -> None:
    """Top-k over the kept logits, softmax over the chosen, in float64, from the router's input."""
    plan = random_plan(seed, keep=3)
    seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    routers = [layer.mlp.router for layer in engine.model.model.layers]
    weights = [(r.weight.detach().double(), r.bias.detach().double().clone()) for r in routers]
    handles = [
        r.register_forward_hook(lambda module, args, out: seen.append((args[0], out[1], out[2])))
        for r in routers
    ]
    try:
        evaluate_masked(engine, make_blocks(1, 24, seed=seed), plan, nothing)
    finally:
        for handle in handles:
            handle.remove()
    assert len(seen) == 2
    for (hidden, gates, ids), (weight, bias), kept in zip(seen, weights, plan.kept, strict=True):
        for token in range(len(hidden)):
            logits = {j: float(hidden[token].double() @ weight[j] + bias[j]) for j in kept}
            chosen = sorted(kept, key=lambda j: -logits[j])[: engine.top_k]
            total = sum(np.exp(logits[j]) for j in chosen)
            assert ids[token].tolist() == chosen
            expected = [np.exp(logits[j]) / total for j in chosen]
            np.testing.assert_allclose(gates[token].numpy(), expected, rtol=1e-4, atol=1e-6)


def biases(engine: TransformersEngine) -> list[np.ndarray[Any, Any]]:
    return [layer.mlp.router.bias.detach().numpy().copy() for layer in engine.model.model.layers]


def test_masking_is_undone_also_when_the_body_raises(
    engine: TransformersEngine, make_blocks: Callable[..., Blocks]
) -> None:
    before, blocks = biases(engine), make_blocks(2, 20)
    scores = engine.score(blocks, nothing)

    def body() -> None:
        with engine.masked(random_plan(1, 2)):
            assert any(np.isinf(bias).any() for bias in biases(engine))
            assert not np.array_equal(engine.score(blocks, nothing).logp_T, scores.logp_T)
            raise RuntimeError("body")

    with pytest.raises(RuntimeError, match="body"):
        body()
    assert all(np.array_equal(a, b) for a, b in zip(before, biases(engine), strict=True))
    again = engine.score(blocks, nothing)
    assert np.array_equal(scores.logp_T, again.logp_T)


def test_masks_nest(engine: TransformersEngine) -> None:
    before = biases(engine)
    outer, inner = KeepPlan(((0, 1, 2), (3, 4, 5)), 8), KeepPlan(((1, 2), (4, 5)), 8)
    with engine.masked(outer):
        between = biases(engine)
        with engine.masked(inner):
            finite = [np.flatnonzero(np.isfinite(bias)).tolist() for bias in biases(engine)]
            assert finite == [[1, 2], [4, 5]]
        assert all(np.array_equal(a, b) for a, b in zip(between, biases(engine), strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(before, biases(engine), strict=True))


@pytest.mark.parametrize(
    "plan",
    [KeepPlan(((0, 1),), 8), KeepPlan(((0, 1),) * 3, 8), KeepPlan(((0, 1), (0, 1)), 4)],
    ids=["fewer layers", "more layers", "fewer experts"],
)
def test_a_plan_of_another_model_is_refused_and_changes_nothing(
    engine: TransformersEngine, plan: KeepPlan
) -> None:
    before = biases(engine)
    with pytest.raises(ValueError), engine.masked(plan):  # noqa: PT011 - UserError is a ValueError
        pass
    assert all(np.array_equal(a, b) for a, b in zip(before, biases(engine), strict=True))


def test_masking_all_kept_changes_nothing(
    engine: TransformersEngine, make_blocks: Callable[..., Blocks]
) -> None:
    blocks = make_blocks(2, 20)
    all_kept = KeepPlan((tuple(range(8)),) * 2, 8)
    plain = engine.score(blocks, nothing)
    masked = evaluate_masked(engine, blocks, all_kept, nothing)
    assert np.array_equal(plain.logp_T, masked.logp_T)


def test_an_mxfp4_checkpoint_loads_with_the_values_its_bytes_stand_for(
    checkpoint: Path, engine: TransformersEngine
) -> None:
    """e2m1 nibbles, low first, times 2^(scale - 127), against the loaded weights."""
    e2m1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    values = np.array([*e2m1, *(-v for v in e2m1)])
    stored = tiny.tensors(json.loads((checkpoint / "config.json").read_text()), 0)
    for layer, module in enumerate(engine.family.experts(engine.model)):
        for name in ("gate_up_proj", "down_proj"):
            prefix = f"model.layers.{layer}.mlp.experts.{name}"
            blocks, scales = stored[prefix + "_blocks"], stored[prefix + "_scales"]
            nibbles = np.stack([blocks & 15, blocks >> 4], axis=-1)
            decoded = values[nibbles].reshape(*blocks.shape[:3], 32)
            decoded = decoded * 2.0 ** (scales[..., None].astype(float) - 127)
            decoded = decoded.reshape(*blocks.shape[:2], -1).transpose(0, 2, 1)
            assert np.array_equal(getattr(module, name).detach().double().numpy(), decoded)
