"""Repair of families without biases, fused or a tensor an expert, by transformers' own forward."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from support import architectures, tiny

from eaft_prune.checkpoints.families import family_of
from eaft_prune.checkpoints.formats import FLOATS
from eaft_prune.checkpoints.formats.base import Storage
from eaft_prune.checkpoints.projections import changeable, projections_of
from eaft_prune.checkpoints.read import TensorEntry, open_model
from eaft_prune.checks.verify import check_base
from eaft_prune.config import CompensationSettings
from eaft_prune.core.types import Blocks, KeepPlan, UserError
from eaft_prune.engines.transformers import TransformersEngine
from eaft_prune.records.manifest import read_manifest
from eaft_prune.repair.compensate import Compensation, compensate
from eaft_prune.repair.distance import distance
from eaft_prune.repair.layer import How, Level
from eaft_prune.repair.streams import experts_of, leave, pass_by, start, step
from eaft_prune.stages.export import Target, export

DENSE = {"num_hidden_layers": 5, "mlp_only_layers": [0, 2, 4]}
PLAN = KeepPlan(((0, 2, 3, 7), (1, 2, 4, 5)), 8)


def written(source: Path, out: Path, done: Compensation | None, level: Level) -> Path:
    """The plan's checkpoint, with what repair changed."""
    files, entries, start = open_model(source), dict[str, TensorEntry](), 0
    data = out.with_suffix(".bytes")
    data.write_bytes(done.data.tobytes() if done else b"")
    places, hashes = projections_of(files.tensors), dict[str, str]()
    family = family_of(files.config)
    numbers = family.layer_numbers(files.config)
    for layer, name, shape, nbytes in done.tensors if done else ():
        whole = TensorEntry(name, str(data), "", shape, start, nbytes)
        for entry in places[numbers[layer]].entries(name, whole, files.tensors):
            entries[entry.name] = entry
            own = data.read_bytes()[entry.start : entry.start + entry.nbytes]
            hashes[entry.name] = hashlib.sha256(own).hexdigest()
        start += nbytes
    how = {"base": {"label": "tiny", "digest": "0" * 64}}
    if done:
        facts = {"level": level, "scored_tokens": done.scored_tokens, "pack": "p"}
        how |= {"compensation": facts, "changed_tensors": hashes}
    target = Target(out, "k", 10**9, how, changed=entries)
    export(family, files, PLAN, target, lambda n: None)
    return out


@torch.no_grad()
def stream(path: Path, blocks: Blocks) -> torch.Tensor:
    """Behind the last layer, at predictors."""
    after: list[torch.Tensor] = []
    model = tiny.eager_model(path)
    model.model.layers[-1].register_forward_hook(lambda m, i, o: after.append(o))
    model.model(torch.from_numpy(blocks.ids_BS).long(), use_cache=False)
    block, position = np.nonzero(blocks.scored_BS)
    return after[0][block, position - 1].double()


@pytest.mark.parametrize("level", ["down_proj", "experts"])
@pytest.mark.parametrize(
    ("model_type", "fused"),
    [("qwen3_moe", True), ("qwen3_moe", False), ("mixtral", True), ("mixtral", False)],
)
def test_what_is_written_is_nearer_to_the_base_and_verified(
    model_type: str,
    fused: bool,
    level: Level,
    tmp_path: Path,
    load: Callable[..., TransformersEngine],
    make_blocks: Callable[..., Blocks],
) -> None:
    base = tiny.write_moe(tmp_path / "base", model_type, fused)
    blocks, others = make_blocks(40, 64, share=0.6), make_blocks(6, 64, seed=1)
    files = open_model(base)
    storage = projections_of(files.tensors)[0].storage
    assert storage.bias is None
    how = How(level, CompensationSettings(passes=1), storage)
    done = compensate(load(base), PLAN, blocks, how, lambda tokens: None)
    plain = written(base, tmp_path / "plain", None, level)
    repaired = written(base, tmp_path / "repaired", done, level)
    for tokens in (blocks, others):
        whole, cut, ours = (stream(path, tokens) for path in (base, plain, repaired))
        assert (whole - ours).norm() < 0.97 * (whole - cut).norm()
    manifest = read_manifest(repaired)
    hashes = {name: facts["sha256"] for name, facts in manifest.files.items()}
    family = family_of(files.config)
    assert check_base(family, manifest, files, hashes, lambda n: None) == []
    assert set(manifest.changed_tensors) <= changeable(files.tensors, level)
    if level == "down_proj":
        assert not set(manifest.changed_tensors) & changeable(files.tensors, "bias")
        ends = {
            name.rsplit("experts.")[1].lstrip("0123456789.") for name in manifest.changed_tensors
        }
        single = {"qwen3_moe": "down_proj.weight", "mixtral": "w2.weight"}[model_type]
        assert ends == {"down_proj" if fused else single}


def test_layers_without_experts_pass_both_streams_on(
    tmp_path: Path, load: Callable[..., TransformersEngine], make_blocks: Callable[..., Blocks]
) -> None:
    """By transformers' own forward, dense layers before, between and behind those with experts."""
    base = tiny.write_moe(tmp_path / "base", "qwen3_moe", fused=False, **DENSE)
    blocks, others = make_blocks(40, 64, share=0.6), make_blocks(6, 64, seed=1)
    files = open_model(base)
    assert family_of(files.config).layer_numbers(files.config) == (1, 3)
    storage = projections_of(files.tensors)[1].storage
    how = How("down_proj", CompensationSettings(passes=1), storage)
    done = compensate(load(base), PLAN, blocks, how, lambda tokens: None)
    plain = written(base, tmp_path / "plain", None, "down_proj")
    repaired = written(base, tmp_path / "repaired", done, "down_proj")
    for tokens in (blocks, others):
        whole, cut, ours = (stream(path, tokens) for path in (base, plain, repaired))
        assert (whole - ours).norm() < 0.97 * (whole - cut).norm()


@pytest.mark.parametrize("model_type", ["granitemoe", "qwen3_moe"])
@torch.inference_mode()
def test_the_unpruned_stream_ends_in_the_models_own_predictions(
    model_type: str,
    tmp_path: Path,
    load: Callable[..., TransformersEngine],
    make_blocks: Callable[..., Blocks],
) -> None:
    """Granite scales embeddings and logits, Qwen3 may have layers without experts."""
    if model_type == "granitemoe":
        scaled = {"embedding_multiplier": 3.0, "logits_scaling": 0.5, "num_hidden_layers": 2}
        architectures.write(tmp_path / "base", model_type, vocab_size=300, **scaled)
    else:
        tiny.write_moe(tmp_path / "base", model_type, fused=False, **DENSE)
    engine, blocks = load(tmp_path / "base"), make_blocks(8, 64)
    streams = start(engine, PLAN, blocks, torch.device("cpu"))
    for layer in range(2):
        pass_by(streams, layer)
        experts = experts_of(streams, layer)
        leave(streams, step(streams, layer, experts, lambda tokens: None), experts)
    pass_by(streams, 2)
    found = []
    for hidden, (_, rows, targets) in zip(streams.unpruned, engine.batches(blocks), strict=True):
        logits = streams.head(engine.model.base_model.norm(hidden.flatten(0, 1)[rows]))
        found += logits.log_softmax(-1).gather(1, targets[:, None])[:, 0].tolist()
    np.testing.assert_allclose(found, engine.score(blocks, lambda n: None).logp_T, atol=1e-4)
    held = torch.ones(len(found), dtype=torch.bool)
    assert distance(streams, held) > 0


def test_a_model_without_biases_has_none_to_move(
    tmp_path: Path, load: Callable[..., TransformersEngine], make_blocks: Callable[..., Blocks]
) -> None:
    base = tiny.write_moe(tmp_path / "base", "mixtral", fused=False)
    storage = projections_of(open_model(base).tensors)[0].storage
    how = How("bias", CompensationSettings(), storage)
    with pytest.raises(UserError, match="have no biases"):
        compensate(load(base), PLAN, make_blocks(8, 64), how, lambda tokens: None)


@pytest.mark.parametrize(
    ("model_type", "said"),
    [
        ("qwen3_vl_moe", "is more than a language model"),
        ("gemma4_text", "gives its layers more than a stream"),
        ("deepseek_v4", "has other streams"),
    ],
)
def test_a_model_of_another_build_is_refused(
    model_type: str,
    said: str,
    tmp_path: Path,
    load: Callable[..., TransformersEngine],
    make_blocks: Callable[..., Blocks],
) -> None:
    more = {"vocab_size_per_layer_input": 300} if model_type == "gemma4_text" else {}
    architectures.write(tmp_path / "base", model_type, vocab_size=300, **more)
    engine = load(tmp_path / "base")
    layers = len(engine.family.experts(engine.model))
    plan = KeepPlan(((0, 2, 3, 7),) * layers, 8)
    how = How("down_proj", CompensationSettings(), Storage(FLOATS["F32"], None))
    with pytest.raises(UserError, match=rf"this model {said}.*use none"):
        compensate(engine, plan, make_blocks(8, 64), how, lambda tokens: None)
