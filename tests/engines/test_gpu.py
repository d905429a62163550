"""The engine on CUDA: the same numbers as transformers' eager forward on the same device."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import tiny
from support.engines import options

from eaft_prune.checkpoints.families import family_of
from eaft_prune.checkpoints.formats import FLOATS, MXFP4
from eaft_prune.checkpoints.formats.base import Storage
from eaft_prune.checkpoints.read import open_model
from eaft_prune.checkpoints.tensors import reader
from eaft_prune.config import CompensationSettings
from eaft_prune.core.types import Blocks, KeepPlan, UserError
from eaft_prune.engines.loading import load_files
from eaft_prune.engines.packed_model import build
from eaft_prune.engines.transformers import TransformersEngine
from eaft_prune.repair import streams as residual
from eaft_prune.repair.compensate import compensate
from eaft_prune.repair.layer import How, Level, Task, fit

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# grouped_mm wants 16-byte rows, so the tiny model is made a little wider than on CPU
WIDER = {"hidden_size": 128, "intermediate_size": 64, "sliding_window": 32}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_checkpoint(tmp_path_factory.mktemp("gpu") / "model", **WIDER)


def blocks(seq_len: int = 96, count: int = 8) -> Blocks:
    rng = np.random.default_rng(0)
    scored = rng.random((count, seq_len)) < 0.6
    scored[:, 0] = False
    ids = rng.integers(9, 265, (count, seq_len)).astype(np.int32)
    rows = np.zeros_like(ids)
    return Blocks("x", seq_len, ids, scored, rows, np.zeros(1, np.int32), ("x",), "")


RUNTIME: dict[str, Any] = {"device": "cuda", "dtype": "bfloat16", "batch_tokens": 256}


def engine(path: Path, dtype: str) -> TransformersEngine:
    files = open_model(path)
    return load_files(files, options(**{**RUNTIME, "dtype": dtype}))


def eager_logp(path: Path, dtype: torch.dtype, cut: Blocks) -> np.ndarray:
    from transformers import AutoModelForCausalLM, Mxfp4Config

    model = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=dtype,
        quantization_config=Mxfp4Config(dequantize=True),
        attn_implementation="eager",
        experts_implementation="eager",
    )
    for module in family_of(open_model(path).config).experts(model):
        module.to(dtype)  # transformers 5.17 leaves dequantised experts in bfloat16
    ids = torch.from_numpy(cut.ids_BS).long().cuda()
    with torch.inference_mode():
        logp = torch.log_softmax(model.eval().cuda()(ids).logits.float(), -1)
    picked = logp[:, :-1].gather(2, ids[:, 1:, None]).squeeze(2)
    return picked[torch.from_numpy(cut.scored_BS[:, 1:]).cuda()].cpu().numpy()


def test_log_p_is_that_of_transformers_eager(checkpoint: Path) -> None:
    cut = blocks()
    ours = engine(checkpoint, "float32").score(cut, lambda done: None).logp_T
    assert relative(ours, eager_logp(checkpoint, torch.float32, cut)) < 1e-4


def test_bfloat16_is_as_close_to_float32_as_transformers_eager_is(checkpoint: Path) -> None:
    """Rounding flips some routing of a random model, so the yardstick is eager's own error."""
    cut = blocks()
    exact = eager_logp(checkpoint, torch.float32, cut)
    ours = engine(checkpoint, "bfloat16").score(cut, lambda done: None).logp_T
    eager = eager_logp(checkpoint, torch.bfloat16, cut)
    assert relative(ours, exact) < 1.5 * relative(eager, exact)


def relative(value: np.ndarray, reference: np.ndarray) -> float:
    return float(np.linalg.norm(value - reference) / np.linalg.norm(reference))


def test_trace_gives_the_scores_of_score(checkpoint: Path) -> None:
    cut = blocks()
    model = engine(checkpoint, "bfloat16")
    trace = model.trace(cut, lambda done: None)
    np.testing.assert_array_equal(trace.scores.logp_T, model.score(cut, lambda done: None).logp_T)
    assert np.allclose(trace.weights_TLK.sum(-1), 1, atol=2e-2)
    assert (trace.norms_TLK > 0).all()


def test_packed_streamed_and_dequantised_experts_give_the_same_bits(checkpoint: Path) -> None:
    files = open_model(checkpoint)
    packed = engine(checkpoint, "bfloat16")
    dense = load_files(files, options("dense", **RUNTIME))
    device = packed.device
    streamed = [
        replace(packed, model=build(files, [device], torch.bfloat16, layers, reader(files)))
        for layers in (1, 2)
    ]
    cut = blocks()
    exact = packed.trace(cut, lambda done: None)
    for other in (dense, *streamed, streamed[1]):
        trace = other.trace(cut, lambda done: None)
        np.testing.assert_array_equal(trace.scores.logp_T, exact.scores.logp_T)
        np.testing.assert_array_equal(trace.experts_TLK, exact.experts_TLK)
        np.testing.assert_array_equal(trace.norms_TLK, exact.norms_TLK)


def test_layers_on_two_gpus_give_the_same_bits(checkpoint: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    files = open_model(checkpoint)
    one = engine(checkpoint, "bfloat16")
    gpus = [torch.device("cuda", index) for index in range(2)]
    two = replace(one, model=build(files, gpus, torch.bfloat16, 0, reader(files)))
    exact, trace = (e.trace(blocks(), lambda done: None) for e in (one, two))
    np.testing.assert_array_equal(trace.scores.logp_T, exact.scores.logp_T)
    np.testing.assert_array_equal(trace.norms_TLK, exact.norms_TLK)


def test_masked_experts_are_never_chosen(checkpoint: Path) -> None:
    model = engine(checkpoint, "bfloat16")
    plan = KeepPlan(((0, 2, 5, 7), (1, 2, 3, 6)), 8)
    with model.masked(plan):
        trace = model.trace(blocks(), lambda done: None)
    for layer, kept in enumerate(plan.kept):
        assert set(np.unique(trace.experts_TLK[:, layer])) <= set(kept)


@pytest.mark.parametrize("level", ["down_proj", "experts"])
def test_compensation_leaves_the_residuals_it_leaves_on_the_cpu(
    checkpoint: Path, level: Level
) -> None:
    rng = np.random.default_rng(1)
    cut = blocks(count=40)
    cut = replace(cut, row_BS=rng.integers(0, 9, cut.row_BS.shape).astype(np.int32))
    plan = KeepPlan(((0, 2, 3, 7), (1, 2, 4, 5)), 8)
    files = open_model(checkpoint)
    settings = CompensationSettings(ridge=0.3, passes=1)
    how = How(level, settings, Storage(MXFP4, FLOATS["F32"]))
    on_gpu, on_cpu = (
        compensate(load_files(files, options(**runtime)), plan, cut, how, lambda tokens: None)
        for runtime in (RUNTIME, {**RUNTIME, "device": "cpu", "dtype": "float32"})
    )
    assert on_gpu.tensors == on_cpu.tensors
    np.testing.assert_allclose(on_gpu.stored, on_cpu.stored, rtol=0.05)
    np.testing.assert_allclose(on_gpu.held_out, on_cpu.held_out, rtol=0.05)


def test_compensation_with_streams_in_host_memory_gives_the_same_bits(checkpoint: Path) -> None:
    cut = blocks(count=40)
    rows = np.random.default_rng(1).integers(0, 9, cut.row_BS.shape)
    cut = replace(cut, row_BS=rows.astype(np.int32))
    model = engine(checkpoint, "bfloat16")
    plan = KeepPlan(((0, 2, 3, 7), (1, 2, 4, 5)), 8)
    storage = Storage(MXFP4, FLOATS["F32"])
    how = How("experts", CompensationSettings(ridge=0.3, passes=1), storage)
    held_T = torch.arange(cut.scored_tokens) % 10 == 0
    fits = []
    for place in (torch.device("cpu"), model.device):
        streams = residual.start(model, plan, cut, place)
        base = residual.experts_of(streams, 0)
        behind = residual.step(streams, 0, base, lambda tokens: None)
        fits.append(fit(behind, base, Task(how, held_T, held_T.roll(1), place)))
    host, device = fits
    assert all(torch.equal(host.stored[name], part) for name, part in device.stored.items())
    assert (host.solved, host.held_out) == (device.solved, device.held_out)


def test_kernels_that_transformers_cannot_use_are_an_error(checkpoint: Path) -> None:
    """It would only warn, dequantise, and be recorded as what it is not."""
    from transformers.utils import is_kernels_available

    if is_kernels_available():
        pytest.skip("the package `kernels` is here")
    with pytest.raises(UserError, match=r"engine\.experts = 'kernels' needs .*not installed"):
        load_files(open_model(checkpoint), options(experts="kernels", **RUNTIME))
