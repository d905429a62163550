"""FP8, NVFP4, MXFP4 and INT4 checkpoints: decoded as others decode them, sliced byte for byte."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import load_file, save_file
from support import tiny

from eaft_prune.checkpoints.families import family_of
from eaft_prune.checkpoints.formats import nan_test
from eaft_prune.checkpoints.formats.matrices import matrices
from eaft_prune.checkpoints.read import file_hashes, model_digest, open_model
from eaft_prune.checkpoints.size import parameters
from eaft_prune.checks.verify import check_base, check_files, smoke_load
from eaft_prune.core.types import Blocks, KeepPlan, UserError
from eaft_prune.records.manifest import read_manifest
from eaft_prune.stages.export import Target, export

if TYPE_CHECKING:
    from eaft_prune.engines.transformers import TransformersEngine

Weights = dict[str, torch.Tensor]
PLAN = KeepPlan(((0, 2, 3, 6, 7), (1, 2, 4, 5, 7), (0, 1, 2, 3, 4)), 8)
FP8_MAX = 448.0


@dataclass(frozen=True)
class Case:
    """How a matrix `X.weight` is stored, and what it then is by somebody else's decoder."""

    quantization: Mapping[str, Any]
    stored: Callable[[torch.Tensor], tuple[Weights, torch.Tensor]]  # suffixes after `X.`


def fp8_blocks(weight: torch.Tensor, block: int = 24) -> tuple[Weights, torch.Tensor]:
    """A scale for each block of rows and columns, the last ones smaller; a loop over blocks."""
    numbers = torch.zeros(weight.shape, dtype=torch.float8_e4m3fn)
    rows, columns = (range(0, size, block) for size in weight.shape)
    scale = torch.zeros(len(rows), len(columns))
    exact = torch.zeros_like(weight)
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            at = slice(row, row + block), slice(column, column + block)
            scale[i, j] = weight[at].abs().max() / FP8_MAX
            numbers[at] = (weight[at] / scale[i, j]).to(torch.float8_e4m3fn)
            exact[at] = numbers[at].float() * scale[i, j]
    return {"weight": numbers, "weight_scale_inv": scale}, exact


def fp8_rows(weight: torch.Tensor) -> tuple[Weights, torch.Tensor]:
    scale = weight.abs().amax(1, keepdim=True) / FP8_MAX
    numbers = (weight / scale).to(torch.float8_e4m3fn)
    parts = {"weight": numbers, "weight_scale": scale, "input_scale": torch.tensor(0.5)}
    return parts, numbers.float() * scale


def compressed(form: str, group: int, kind: str) -> Callable[[Any], tuple[Weights, torch.Tensor]]:
    """By the compressor of that name of compressed-tensors, and back by it."""

    def stored(weight: torch.Tensor) -> tuple[Weights, torch.Tensor]:
        args: dict[str, Any] = {"num_bits": 4, "type": kind, "symmetric": True}
        args |= {"strategy": "tensor_group" if group == 16 else "group", "group_size": group}
        scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args))
        largest = weight.unflatten(1, (-1, group)).abs().amax(-1)
        state = {"weight": weight, "weight_scale": largest / (7 if kind == "int" else 6)}
        if form == "mxfp4-pack-quantized":
            state["weight_scale"] = torch.exp2(torch.floor(torch.log2(state["weight_scale"])))
        if group == 16:
            whole = FP8_MAX * 6 / weight.abs().max()
            state["weight_global_scale"] = whole.reshape(1)
            scale = (state["weight_scale"] * whole).to(torch.float8_e4m3fn).float()
            state["weight_scale"] = scale
        codec = BaseCompressor.get_value_from_registry(form)
        parts = dict(codec.compress(state, scheme))
        theirs = codec.decompress(dict(parts), scheme)["weight"].float()
        if kind == "int":
            return parts, theirs
        # it multiplies in bfloat16: the same numbers and scales without that rounding
        numbers = unpack_fp4_from_uint8(parts["weight_packed"], *weight.shape, torch.float32)
        scale = state["weight_scale"] / state.get("weight_global_scale", torch.ones(1))
        exact = numbers * scale.repeat_interleave(group, 1)
        torch.testing.assert_close(exact, theirs, rtol=2**-7, atol=0)
        return parts, exact

    return stored


def modelopt(weight: torch.Tensor) -> tuple[Weights, torch.Tensor]:
    """NVFP4 as others name it: the scale of all is stored as it is, not as its inverse."""
    parts, exact = compressed("nvfp4-pack-quantized", 16, "float")(weight)
    whole = 1 / parts.pop("weight_global_scale").reshape(())
    renamed = {"weight": parts["weight_packed"], "weight_scale": parts["weight_scale"]}
    return {**renamed, "weight_scale_2": whole, "input_scale": torch.tensor(1.0)}, exact


def deepseek(weight: torch.Tensor) -> tuple[Weights, torch.Tensor]:
    """MXFP4 with its scales as e8m0 numbers beside the weight."""
    parts, exact = compressed("mxfp4-pack-quantized", 32, "float")(weight)
    numbers = parts["weight_packed"].view(torch.int8)
    return {"weight": numbers, "scale": parts["weight_scale"].view(torch.float8_e8m0fnu)}, exact


CASES = {
    "fp8-blocks": Case({"quant_method": "fp8", "weight_block_size": [24, 24]}, fp8_blocks),
    "fp8-rows": Case({"quant_method": "compressed-tensors"}, fp8_rows),
    "int4": Case({"quant_method": "compressed-tensors"}, compressed("pack-quantized", 32, "int")),
    "nvfp4": Case(
        {"quant_method": "compressed-tensors"}, compressed("nvfp4-pack-quantized", 16, "float")
    ),
    "mxfp4": Case(
        {"quant_method": "compressed-tensors"}, compressed("mxfp4-pack-quantized", 32, "float")
    ),
    "nvfp4-modelopt": Case({"quant_method": "modelopt"}, modelopt),
    "mxfp4-deepseek": Case({"quant_method": "fp8"}, deepseek),
}


def weights_of(path: Path) -> Weights:
    return {k: v for file in path.glob("*.safetensors") for k, v in load_file(file).items()}


def nothing(done: int) -> None:
    pass


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dense") / "base"
    return tiny.write_moe(path, "qwen3_moe", fused=False, num_hidden_layers=3)


@pytest.fixture(scope="module", params=CASES)
def pair(
    request: pytest.FixtureRequest, dense: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A checkpoint with packed projections, and one of the floats that others decode them to."""
    case, home = CASES[request.param], tmp_path_factory.mktemp(request.param)
    packed, exact = Weights(), Weights()
    for name, tensor in weights_of(dense).items():
        if not name.endswith("_proj.weight"):
            packed[name] = exact[name] = tensor
            continue
        parts, exact[name] = case.stored(tensor)
        stem = name.removesuffix("weight")
        packed |= {stem + suffix: part.contiguous() for suffix, part in parts.items()}
    config = json.loads((dense / "config.json").read_text())
    for folder, weights, more in (
        ("packed", packed, {"quantization_config": dict(case.quantization)}),
        ("exact", exact, {}),
    ):
        shutil.copytree(dense, home / folder, ignore=shutil.ignore_patterns("*.safetensors*"))
        save_file(weights, home / folder / "model.safetensors", metadata={"format": "pt"})
        (home / folder / "config.json").write_text(json.dumps({**config, **more}))
    return home / "packed", home / "exact"


def blocks() -> Blocks:
    ids = np.random.default_rng(0).integers(3, 300, (2, 40)).astype(np.int32)
    scored = np.ones(ids.shape, bool)
    scored[:, 0] = False
    return Blocks("p", 40, ids, scored, np.zeros_like(ids), np.zeros(1, np.int32), ("p",), "")


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def test_packed_weights_are_what_others_decode_them_to(
    pair: tuple[Path, Path], load: Callable[..., TransformersEngine]
) -> None:
    ours, theirs = (load(path).score(blocks(), nothing).logp_T for path in pair)
    np.testing.assert_allclose(ours, theirs, atol=2e-5)
    packed, exact = (open_model(path) for path in pair)
    assert parameters(packed) == parameters(exact)
    assert len(matrices(packed.tensors)) == 3 * (4 + 3 * 8)


def test_kept_experts_keep_their_bytes_and_the_cut_model_is_the_masked_one(
    pair: tuple[Path, Path], load: Callable[..., TransformersEngine], tmp_path: Path
) -> None:
    files = open_model(pair[0])
    family, hashes = family_of(files.config), file_hashes(files, nothing)
    how = {"base": {"label": "tiny", "digest": model_digest(hashes)}}
    out = export(family, files, PLAN, Target(tmp_path / "out", "k", 10**9, how), nothing).path
    written, source, result = open_model(out), weights_of(pair[0]), weights_of(out)
    for layer, kept in enumerate(PLAN.kept):
        for new, old in enumerate(kept):
            ours, theirs = (f"model.layers.{layer}.mlp.experts.{i}." for i in (new, old))
            names = [name for name in source if name.startswith(theirs)]
            assert len(names) >= 6
            for name in names:
                copy = result[ours + name.removeprefix(theirs)]
                assert copy.dtype == source[name].dtype
                assert bytes_of(copy) == bytes_of(source[name]), name
    family.table(written)
    engine = load(files.path)
    with engine.masked(PLAN):
        masked = engine.score(blocks(), nothing).logp_T
    np.testing.assert_allclose(masked, load(out).score(blocks(), nothing).logp_T, atol=1e-5)
    manifest = read_manifest(out)
    assert check_files(manifest, nothing) == []
    assert check_base(family, manifest, files, hashes, nothing) == []


def test_transformers_dequantises_fp8_blocks_alike(
    dense: Path, load: Callable[..., TransformersEngine], tmp_path: Path
) -> None:
    """Its blocks are whole ones, so here a matrix is one."""
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    weights = Weights()
    for name, tensor in weights_of(dense).items():
        if not name.endswith("_proj.weight"):
            weights[name] = tensor
            continue
        parts, _ = fp8_blocks(tensor, 16)
        weights |= {name.removesuffix("weight") + suffix: part for suffix, part in parts.items()}
    config = json.loads((dense / "config.json").read_text())
    how = {"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic"}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": how}))
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        dtype=torch.float32,
        quantization_config=FineGrainedFP8Config(dequantize=True, weight_block_size=(16, 16)),
    ).eval()
    ids = torch.from_numpy(blocks().ids_BS).long()
    with torch.no_grad():
        logits = theirs(input_ids=ids, use_cache=False).logits.double().log_softmax(-1)
    wanted = logits[:, :-1].gather(2, ids[:, 1:, None]).reshape(-1).numpy()
    ours = load(tmp_path).score(blocks(), nothing).logp_T
    np.testing.assert_allclose(ours, wanted, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w, n: w.pop(f"{n}_scale_inv"), r"is F8_E4M3 in a way that is not known.*fp8"),
        (lambda w, n: w.update({f"{n}_zero_point": torch.zeros(2, dtype=torch.int32)}), "is I32"),
        (lambda w, n: w.update({n: w[n][:-1].clone()}), "has shape"),
    ],
)
def test_what_is_packed_otherwise_is_refused_and_the_method_named(
    dense: Path, tmp_path: Path, change: Any, said: str
) -> None:
    weights, name = weights_of(dense), "model.layers.1.mlp.experts.3.up_proj.weight"
    parts, _ = fp8_blocks(weights.pop(name))
    weights |= {name.removesuffix("weight") + suffix: part for suffix, part in parts.items()}
    change(weights, name)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((dense / "config.json").read_text())
    how = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [24, 24]}}
    (tmp_path / "config.json").write_text(json.dumps({**config, **how}))
    files = open_model(tmp_path)
    with pytest.raises(UserError, match=said):
        family_of(files.config).table(files)


def test_nan_of_eight_bits_is_found() -> None:
    test = nan_test("x.weight", "F8_E4M3")
    assert test is not None
    values = torch.tensor([1.0, -448.0, 0.0]).to(torch.float8_e4m3fn)
    assert not test(values.view(torch.uint8).numpy().tobytes())
    bad = torch.tensor([1.0, float("nan")]).to(torch.float8_e4m3fn)
    assert test(bad.view(torch.uint8).numpy().tobytes())


def test_a_packed_checkpoint_loads_when_verified(pair: tuple[Path, Path]) -> None:
    files = open_model(pair[0])
    assert smoke_load(family_of(files.config), files.path) == []
