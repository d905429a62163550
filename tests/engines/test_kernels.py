"""Every Triton kernel against plain torch in higher precision: on CUDA, or interpreted."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # read where kernels are defined: before their import
pytest.importorskip("triton")

from support import architectures  # noqa: E402
from support.engines import options  # noqa: E402

from eaft_prune.checkpoints.families import family_of  # noqa: E402
from eaft_prune.checkpoints.read import open_model  # noqa: E402
from eaft_prune.engines import experts, packed  # noqa: E402
from eaft_prune.engines.gpt_oss_cuda import hidden_states  # noqa: E402
from eaft_prune.engines.kernels import attention, head, moe, mxfp4, norm  # noqa: E402
from eaft_prune.engines.loading import load_files  # noqa: E402

DEVICE = torch.device("cuda" if CUDA else "cpu")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
DTYPES = [torch.float32, torch.bfloat16]
# float32 matrix products are tf32 on CUDA; the interpreter has no bfloat16 ones
DOT_DTYPES = [torch.bfloat16] if CUDA else [torch.float32]


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)


def error(value: torch.Tensor, exact: torch.Tensor) -> float:
    """||value - exact|| / ||exact||; NaN stays NaN and passes no comparison."""
    value, exact = value.double(), exact.double()
    return float((value - exact).norm() / exact.norm())


def test_every_mxfp4_byte_at_every_scale_is_what_transformers_makes_of_it() -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    codes = torch.arange(256, dtype=torch.uint8).repeat(255, 1).view(1, 255, 16, 16)
    scales = torch.arange(255, dtype=torch.uint8)[:, None].expand(255, 16)[None].contiguous()
    exact = convert_moe_packed_tensors(codes.clone(), scales.clone()).transpose(1, 2).cpu()
    out = torch.full((1, 255, 512), math.nan, dtype=torch.bfloat16, device=DEVICE)
    kernel = mxfp4.dequantize(codes.to(DEVICE), scales.to(DEVICE), out)
    # scales 0 and 1 make bfloat16 subnormals, which Triton's interpreter does not round to
    from_scale = 0 if CUDA else 2
    assert torch.equal(kernel.cpu()[:, from_scale:], exact[:, from_scale:])
    plain = packed.dequantize(codes, scales, torch.empty(1, 255, 512, dtype=torch.bfloat16))
    assert torch.equal(plain, exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "inner"), [(8, 48), (5, 40), (4, 1100)])
def test_swiglu(rows: int, inner: int, dtype: torch.dtype) -> None:
    gate_up, bias = randn(rows, 2 * inner, dtype=dtype), randn(3, 2 * inner, dtype=dtype)
    ids = torch.arange(rows, device=DEVICE) % 3
    x = gate_up.double() + bias[ids].double()
    gate, up = x[:, ::2].clamp(max=0.8), x[:, 1::2].clamp(-0.8, 0.8)
    exact = (up + 1) * gate * torch.sigmoid(1.702 * gate)
    ours = moe.clamped_swiglu(gate_up, ids, bias, 1.702, 0.8)
    assert error(ours, exact) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "inner"), [(8, 48), (5, 40), (4, 1100)])
def test_silu_gate(rows: int, inner: int, dtype: torch.dtype) -> None:
    gate_up = randn(rows, 2 * inner, dtype=dtype)
    gate, up = gate_up.double().chunk(2, -1)
    exact = torch.nn.functional.silu(gate) * up
    assert error(moe.silu_gate(gate_up), exact) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [True, False])
def test_combine(dtype: torch.dtype, biased: bool) -> None:
    n, k, hidden = 6, 4, 40
    down = randn(n * k, hidden, dtype=dtype)
    bias = randn(3, hidden, dtype=dtype) if biased else None
    where = torch.randperm(n * k, generator=torch.Generator().manual_seed(1)).view(n, k).to(DEVICE)
    ids, gates = torch.arange(n * k, device=DEVICE).view(n, k) % 3, randn(n, k, dtype=dtype).abs()
    y = down[where].double() + (0 if bias is None else bias[ids].double())
    out, norms = moe.combine(down, where.int(), ids, gates, bias)
    assert error(out, (y * gates.double()[..., None]).sum(1)) < TOLERANCE[dtype]
    assert error(norms, y.norm(dim=-1)) < 1e-5  # of unrounded values


@pytest.mark.parametrize("dtype", DTYPES)
def test_residual_and_norm(dtype: torch.dtype) -> None:
    x, delta, weight = (randn(*shape, dtype=dtype) for shape in ((5, 40), (5, 40), (40,)))
    total = (x + delta).double()
    exact = weight.double() * total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + 1e-5)
    ours = norm.add_norm_(x, delta, weight, 1e-5)
    assert torch.equal(x.double(), total)
    assert error(ours, exact) < TOLERANCE[dtype]
    again = norm.add_norm_(x, None, weight, 1e-5)
    assert torch.equal(again, ours)


@pytest.mark.parametrize("vocab", [7, 265, 700, 5000])
def test_log_sum_exp_and_top_of_logits(vocab: int) -> None:
    k = min(20, vocab)
    logits = (randn(3, vocab) * 4).to(torch.bfloat16)  # rounded: there are ties
    lse, values, ids = head.lse_and_top(logits, k)
    assert error(lse, torch.logsumexp(logits.double(), -1)) < 1e-6
    assert torch.equal(values, logits.float().topk(k).values)
    assert torch.equal(logits.float().gather(1, ids.long()), values)
    assert all(len(set(row)) == k for row in ids.tolist())


def test_nan_logits_are_not_hidden() -> None:
    logits = randn(2, 300)
    logits[1, 100] = math.nan
    lse = head.lse_and_top(logits, 20)[0]
    assert torch.isnan(lse).tolist() == [False, True]


@pytest.mark.parametrize("dtype", DOT_DTYPES)
@pytest.mark.parametrize(
    ("length", "window", "sinks"),
    [(150, None, True), (150, 32, True), (130, 128, True), (64, None, False), (70, 7, True)],
)
def test_attention(length: int, window: int | None, sinks: bool, dtype: torch.dtype) -> None:
    query = randn(2, length, 4, 16, dtype=dtype)
    key, value = (randn(2, length, 2, 16, dtype=dtype, seed=s) for s in (1, 2))
    sink = randn(4, dtype=dtype) if sinks else None
    ours = attention.flash_attention(query, key, value, sink, 0.25, window)
    assert error(ours, exact_attention(query, key, value, sink, 0.25, window)) < TOLERANCE[dtype]


def exact_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sink: torch.Tensor | None,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    batch, length, heads, _ = query.shape
    key, value = (t.repeat_interleave(heads // t.shape[2], 2).double() for t in (key, value))
    scores = torch.einsum("bihd,bjhd->bhij", query.double(), key) * scale
    i = torch.arange(length, device=DEVICE)
    seen = i[None] <= i[:, None]
    if window is not None:
        seen &= i[None] > i[:, None] - window
    scores = scores.masked_fill(~seen, -math.inf)
    if sink is not None:
        column = sink.double().view(1, -1, 1, 1).expand(batch, -1, length, 1)
        scores = torch.cat([scores, column], -1)
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1)[..., :length], value)


def test_rotation_in_place() -> None:
    x, cos, sin = randn(2, 5, 3, 8), randn(5, 4), randn(5, 4, seed=1)
    a, b = x[..., :4], x[..., 4:]
    c, s = cos[None, :, None], sin[None, :, None]
    exact = torch.cat([a * c - b * s, b * c + a * s], -1)
    attention.rotate_(x, cos, sin)
    assert error(x, exact) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "half"), [(8, 4), (8, 2), (16, 4)])
def test_norm_and_rotation_of_a_part_in_place(dim: int, half: int, dtype: torch.dtype) -> None:
    x, weight = randn(2, 5, 3, dim, dtype=dtype), randn(dim, dtype=dtype)
    cos, sin = randn(5, 2 * half), randn(5, 2 * half, seed=1)  # halves twice, as models hold them
    wide = x.double()
    wide = weight.double() * wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
    a, b, rest = wide.split([half, half, dim - 2 * half], -1)
    c, s = cos[None, :, None, :half], sin[None, :, None, :half]
    exact = torch.cat([a * c - b * s, b * c + a * s, rest], -1)
    attention.rotate_(x, cos, sin, half, (weight, 1e-5))
    assert error(x, exact) < TOLERANCE[dtype]


@pytest.mark.skipif(CUDA, reason="bfloat16 on CUDA: tests/test_gpu.py compares with eager")
def test_the_kernels_together_are_the_layers_of_transformers(checkpoint: Path) -> None:
    """float32, interpreted: the layers for CUDA against transformers' forward."""
    files = open_model(checkpoint)
    model = load_files(files, options(device="cpu", threads=1)).model
    ids = torch.arange(2 * 24).view(2, 24) * 5 % 256
    with torch.inference_mode():
        ours = hidden_states(model, ids)
        exact = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    assert error(ours, exact.reshape(ours.shape)) < 1e-5


@pytest.mark.skipif(CUDA, reason="bfloat16 on CUDA: tests/test_gpu.py compares with eager")
def test_fused_experts_are_the_looped_ones_of_gpt_oss(checkpoint: Path) -> None:
    files = open_model(checkpoint)
    family = family_of(files.config)
    model = load_files(files, options(device="cpu", dtype="bfloat16", threads=1)).model
    check_experts(family.experts(model)[0], files.config["hidden_size"], family.top_k(files.config))


# silu of halves, gelu, squared relu without a gate
@pytest.mark.skipif(CUDA, reason="bfloat16 on CUDA: tests/test_gpu.py compares with eager")
@pytest.mark.parametrize("name", ["qwen3_moe", "gemma4_text", "nemotron_h"])
def test_fused_experts_are_the_looped_ones(name: str) -> None:
    model = architectures.random_model(architectures.tiny_config(name))
    check_experts(some_experts(model).to(torch.bfloat16), model.config.hidden_size, 2)


def some_experts(model: torch.nn.Module) -> torch.nn.Module:
    return next(m for m in model.modules() if hasattr(m, "has_bias") and hasattr(m, "down_proj"))


def check_experts(module: torch.nn.Module, width: int, k: int) -> None:
    n, count = 9, module.num_experts
    hidden = randn(n, width, dtype=torch.bfloat16)
    ids = torch.stack([torch.randperm(count)[:k] for _ in range(n)])
    gates = randn(n, k, dtype=torch.bfloat16).abs()
    with torch.inference_mode():
        ours, norms = experts._fused(module, hidden, ids, gates)
        plain, plain_norms = experts._looped(module, hidden, ids, gates)
    assert error(ours, plain) < 1e-2
    assert error(norms, plain_norms) < 1e-2
