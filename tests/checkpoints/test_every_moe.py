"""Every MoE architecture of transformers: profiled, left out, written, and loaded by it alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import architectures

from eaft_prune.checkpoints.cut import cut
from eaft_prune.checkpoints.families import any_moe, family_of
from eaft_prune.checkpoints.families.base import with_table
from eaft_prune.checkpoints.read import open_model
from eaft_prune.core.types import Blocks, KeepPlan, UserError
from eaft_prune.stages.export import Target, export, identical_tensors

if TYPE_CHECKING:
    from eaft_prune.engines.transformers import TransformersEngine

HOW = {"base": {"label": "tiny", "digest": "0"}}
DEAR = (pytest.mark.slow, pytest.mark.dear)  # the long tail
ALL = [
    *architectures.WANTED,
    *(pytest.param(name, marks=DEAR) for name in architectures.OTHERS),
]


# transformers runs their experts in modules of their own
OWN_EXPERTS = ("llama4", "llama4_text", "doge", "jetmoe", "longcat_flash")


def nothing(done: int) -> None:
    pass


def plan_of(layers: int, keep: int, groups: int = 1, seed: int = 0) -> KeepPlan:
    """A plan drawn by lot, as many of every group."""
    rng, width = np.random.default_rng(seed), architectures.EXPERTS // groups

    def layer() -> tuple[int, ...]:
        drawn = [g * width + rng.permutation(width)[: keep // groups] for g in range(groups)]
        return tuple(sorted(int(i) for i in np.concatenate(drawn)))

    return KeepPlan(tuple(layer() for _ in range(layers)), architectures.EXPERTS)


def all_of(layers: int) -> KeepPlan:
    return KeepPlan((tuple(range(architectures.EXPERTS)),) * layers, architectures.EXPERTS)


def logp(model: Any, blocks: Blocks) -> np.ndarray[Any, Any]:
    """ln p of every token but the first by transformers' own forward."""
    ids = torch.from_numpy(blocks.ids_BS).long()
    with torch.no_grad():
        values = model(input_ids=ids, use_cache=False).logits.double().log_softmax(-1)
    return values[:, :-1].gather(2, ids[:, 1:, None]).reshape(-1).numpy()


def random_blocks(length: int = 40) -> Blocks:
    ids = np.random.default_rng(0).integers(3, architectures.VOCAB, (2, length)).astype(np.int32)
    scored = np.ones(ids.shape, bool)
    scored[:, 0] = False
    rows = np.zeros(ids.shape, np.int32)
    return Blocks("p", length, ids, scored, rows, np.zeros(1, np.int32), ("p",), "")


@pytest.mark.parametrize("model_type", ALL)
def test_what_is_left_out_is_what_is_written_and_what_transformers_loads(
    model_type: str, load: Callable[..., TransformersEngine], tmp_path: Path
) -> None:
    model = architectures.write(tmp_path / "base", model_type)
    # a few run token after token without their kernels
    blocks = random_blocks(10 if model_type in ("glm5_next", "kimi_linear") else 40)
    files = open_model(tmp_path / "base")
    family = family_of(files.config) if model_type == "gpt_oss" else any_moe.family(files.config)
    assert family.n_experts(files.config) == architectures.EXPERTS
    files, layers = with_table(family, files), family.n_layers(files.config)

    engine = load(files.path)
    trace = engine.trace(blocks, nothing)
    np.testing.assert_allclose(trace.scores.logp_T, logp(model, blocks), atol=1e-4)
    assert trace.experts_TLK.shape == (2 * (blocks.seq_len - 1), layers, family.top_k(files.config))

    plan = plan_of(layers, 6)
    with engine.masked(plan):
        masked = engine.trace(blocks, nothing)
    assert np.array_equal(engine.score(blocks, nothing).logp_T, trace.scores.logp_T)
    for layer, kept in enumerate(plan.kept):
        assert set(np.unique(masked.experts_TLK[:, layer])) <= set(kept)
    written = export(family, files, plan, Target(tmp_path / "out", "k", 10**9, HOW), nothing).path
    alone, info = type(model).from_pretrained(
        written, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    np.testing.assert_allclose(masked.scores.logp_T, logp(alone.eval(), blocks), atol=1e-4)
    assert np.abs(masked.scores.logp_T - trace.scores.logp_T).max() > 1e-3

    everything = cut(family, files, all_of(layers))
    assert everything.files.tensors == files.tensors
    for name, part in everything.slices.items():
        assert part is None or [*part.kept] == [*range(files.tensors[name].shape[part.axis])]
    assert family.patch_config(files.config, architectures.EXPERTS) == files.config


@pytest.mark.parametrize(
    "model_type", ["deepseek_v4", "glm4_moe", "granitemoehybrid", "qwen3_vl_moe"]
)
def test_an_export_of_all_experts_is_the_same_bytes(model_type: str, tmp_path: Path) -> None:
    """Where each tensor's bytes go is checked above, of every architecture; here they are read."""
    architectures.write(tmp_path / "base", model_type)
    files = open_model(tmp_path / "base")
    family = any_moe.family(files.config)
    plan = all_of(family.n_layers(files.config))
    same = export(family, files, plan, Target(tmp_path / "all", "k", 10**9, HOW), nothing).path
    assert identical_tensors(files, open_model(same)) == len(files.tensors)
    fewer = plan_of(family.n_layers(files.config), 6)
    less = export(family, files, fewer, Target(tmp_path / "out", "k", 10**9, HOW), nothing).path
    family.table(open_model(less))


def test_groups_of_experts_lose_as_many_each(
    load: Callable[..., TransformersEngine], tmp_path: Path
) -> None:
    """DeepSeek's routers choose groups first; a plan that favours one is another model's."""
    model = architectures.write(tmp_path / "base", "deepseek_v3", n_group=2, topk_group=1)
    files, blocks = open_model(tmp_path / "base"), random_blocks()
    family = family_of(files.config)
    assert family.groups(files.config) == 2
    assert family.least(files.config) == 4
    engine, plan = load(files.path), plan_of(2, 4, groups=2)
    with engine.masked(plan):
        masked = engine.score(blocks, nothing)
    out = export(family, files, plan, Target(tmp_path / "out", "k", 10**9, HOW), nothing).path
    alone = type(model).from_pretrained(out, dtype=torch.float32).eval()
    np.testing.assert_allclose(masked.logp_T, logp(alone, blocks), atol=1e-4)
    uneven = KeepPlan(((0, 1, 2, 4),) * 2, 8)
    with pytest.raises(UserError, match=r"keeps \[3, 1\] experts of the 2 groups of layer 0"):
        export(family, files, uneven, Target(tmp_path / "no", "k", 10**9, HOW), nothing)
    with pytest.raises(UserError, match="as many of each"), engine.masked(uneven):
        pass


def test_a_correction_bias_switches_experts_off_that_fill_a_layer_up(
    load: Callable[..., TransformersEngine], tmp_path: Path
) -> None:
    """Sigmoid routers add it before they choose: -inf is never chosen."""
    model = architectures.write(tmp_path / "base", "glm4_moe")
    files, blocks = open_model(tmp_path / "base"), random_blocks()
    family, ragged = family_of(files.config), KeepPlan(((0, 2, 5), (1, 2, 3, 4, 7)), 8)
    with (engine := load(files.path)).masked(ragged):
        masked = engine.score(blocks, nothing)
    target = Target(tmp_path / "out", "k", 10**9, HOW, pad_ragged=True)
    out = export(family, files, ragged, target, nothing).path
    alone = type(model).from_pretrained(out, dtype=torch.float32).eval()
    np.testing.assert_allclose(masked.logp_T, logp(alone, blocks), atol=1e-4)


@pytest.mark.parametrize("model_type", ["glm4_moe", "qwen3_vl_moe", "granitemoehybrid"])
def test_a_wrong_count_is_refused(model_type: str, tmp_path: Path) -> None:
    architectures.write(tmp_path / "base", model_type)
    path = shutil.copytree(tmp_path / "base", tmp_path / "wrong")
    config = json.loads((path / "config.json").read_text())
    fewer = any_moe.family(config).patch_config(config, 7)
    assert fewer != config
    (path / "config.json").write_text(json.dumps(fewer))
    with pytest.raises(UserError, match=r"no rule|asks for"):
        any_moe.family(fewer).table(open_model(path))


def test_layers_are_numbered_as_the_model_does(tmp_path: Path) -> None:
    """A first layer without experts has no line in the plan, and the mapping says which have."""
    architectures.write(tmp_path / "base", "glm4_moe")
    files = open_model(tmp_path / "base")
    family = family_of(files.config)
    assert family.layer_numbers(files.config) == (1, 2)
    plan = plan_of(2, 4)
    out = export(family, files, plan, Target(tmp_path / "out", "k", 10**9, HOW), nothing).path
    mapping = json.loads((out / "expert_mapping.json").read_text())["new_to_old"]
    assert {layer: list(ids.values()) for layer, ids in mapping.items()} == {
        "1": list(plan.kept[0]),
        "2": list(plan.kept[1]),
    }


@pytest.mark.parametrize(
    ("model_type", "prefix", "key"),
    [
        ("deepseek_v3", "model.layers.3.", "num_nextn_predict_layers"),
        ("qwen3_5_moe", "mtp.layers.0.", "mtp_num_hidden_layers"),
    ],
)
def test_layers_that_predict_further_tokens_go_with_the_first_expert(
    model_type: str, prefix: str, key: str, tmp_path: Path
) -> None:
    """They route to experts of their own, for which no plan is: config and tensors agree."""
    architectures.write(tmp_path / "base", model_type)
    path = tmp_path / "base" / "model.safetensors"
    weights = load_file(path)
    own = {f"{prefix}mlp.experts.{i}.up_proj.weight": torch.randn(32, 64) for i in range(8)}
    further = {**own, f"{prefix}mlp.gate.weight": torch.randn(8, 64)}
    save_file({**weights, **further}, path, metadata={"format": "pt"})
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps({**config, key: 1}))
    files = open_model(tmp_path / "base")
    family = family_of(files.config)
    layers = family.n_layers(files.config)

    out = export(
        family, files, plan_of(layers, 6), Target(tmp_path / "out", "k", 10**9, HOW), nothing
    ).path
    assert not further.keys() & open_model(out).tensors.keys()
    assert json.loads((out / "config.json").read_text())[key] == 0
    everything = KeepPlan((tuple(range(8)),) * layers, 8)
    same = export(family, files, everything, Target(tmp_path / "all", "k", 10**9, HOW), nothing)
    assert identical_tensors(files, open_model(same.path)) == len(weights) + len(further)
    assert json.loads((same.path / "config.json").read_text())[key] == 1


@pytest.mark.parametrize(
    ("model_type", "said"),
    [
        ("llama", "no experts of this model"),
        *((name, "experts of this model through its experts interface") for name in OWN_EXPERTS),
        ("nemotron_h_omni", "no last hidden states"),
        ("openai_privacy_filter", "describes no openai_privacy_filter model"),
        ("diffusion_gemma", "describes no diffusion_gemma model"),
    ],
)
def test_what_cannot_be_pruned_is_refused_with_the_reason(model_type: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        family_of(architectures.tiny_config(model_type).to_dict())


@pytest.mark.parametrize(
    ("model_type", "said"),
    [
        ("ernie4_5_vl_moe", "layer 1 holds several groups of experts"),
        ("deepseek_ocr2", "describes no deepseek_ocr2 model"),
        ("dbrx", "describes no dbrx model"),
    ],
)
def test_what_has_no_tiny_settings_is_refused_by_its_own(model_type: str, said: str) -> None:
    from transformers import CONFIG_MAPPING

    with pytest.raises(UserError, match=said):
        family_of(CONFIG_MAPPING[model_type]().to_dict())
