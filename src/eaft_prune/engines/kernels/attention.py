"""Causal flash attention with sinks, grouped heads and sliding windows, and rotary embedding."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_LOG2E = 1.4426950408889634
_TILE = 64  # queries and keys; larger ones were slower on an H200 at head size 64


@triton.jit
def _attention_kernel(
    q, k, v, sinks, out, scale, length, heads, groups, window,
    D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, HAS_SINK: tl.constexpr,
):  # fmt: skip
    # later query tiles see more keys: start them first
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    group = head // (heads // groups)
    rows = tile * M + tl.arange(0, M)
    dims = tl.arange(0, D)
    here = rows < length
    q_at = q + ((batch * length + rows[:, None]) * heads + head) * D + dims[None, :]
    query = tl.load(q_at, mask=here[:, None], other=0.0)
    if HAS_SINK:
        top = tl.zeros((M,), tl.float32) + tl.load(sinks + head).to(tl.float32) * 1.44269504
        total = tl.full((M,), 1.0, tl.float32)
    else:
        top = tl.full((M,), float("-inf"), tl.float32)
        total = tl.zeros((M,), tl.float32)
    acc = tl.zeros((M, D), tl.float32)
    k_at = k + (batch * length * groups + group) * D
    v_at = v + (batch * length * groups + group) * D
    first = tl.maximum(tile * M - window + 1, 0) // N * N
    # key tiles that every query of the tile sees in full need no mask
    full_to = tile * M // N * N
    full_from = (tl.maximum(tile * M + M - window, 0) + N - 1) // N * N
    full_from = tl.minimum(tl.maximum(full_from, first), full_to)
    for start in tl.range(first, full_from, N):
        acc, top, total = _step(
            acc, top, total, query, k_at, v_at, start, rows, length, groups, window, scale,
            D, N, True,
        )  # fmt: skip
    for start in tl.range(full_from, full_to, N):
        acc, top, total = _step(
            acc, top, total, query, k_at, v_at, start, rows, length, groups, window, scale,
            D, N, False,
        )  # fmt: skip
    for start in tl.range(full_to, tl.minimum(tile * M + M, length), N):
        acc, top, total = _step(
            acc, top, total, query, k_at, v_at, start, rows, length, groups, window, scale,
            D, N, True,
        )  # fmt: skip
    value = acc / total[:, None]
    o_at = out + ((batch * length + rows[:, None]) * heads + head) * D + dims[None, :]
    tl.store(o_at, value.to(out.dtype.element_ty), mask=here[:, None])


@triton.jit
def _step(
    acc, top, total, query, k_at, v_at, start, rows, length, groups, window, scale,
    D: tl.constexpr, N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    keys = start + tl.arange(0, N)
    dims = tl.arange(0, D)
    there = keys < length
    offset = keys[:, None].to(tl.int64) * (groups * D) + dims[None, :]
    key = tl.load(k_at + offset, mask=there[:, None], other=0.0)
    score = tl.dot(query, tl.trans(key)) * scale
    if MASKED:
        seen = (keys[None, :] <= rows[:, None]) & (keys[None, :] > rows[:, None] - window)
        score = tl.where(seen, score, float("-inf"))
    higher = tl.maximum(top, tl.max(score, 1))
    # a row that has seen no key yet: -inf - -inf is NaN
    safe = tl.where(higher == float("-inf"), 0.0, higher)
    weight = tl.exp2(score - safe[:, None])
    fade = tl.exp2(top - safe)
    total = total * fade + tl.sum(weight, 1)
    value = tl.load(v_at + offset, mask=there[:, None], other=0.0)
    acc = acc * fade[:, None] + tl.dot(weight.to(value.dtype), value)
    return acc, higher, total


def flash_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor | None,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """softmax over (q.k scale for the seen keys, sink) times v; the sink's share goes nowhere.

    query [B, S, H, D], key and value [B, S, G, D], contiguous; query i sees keys i - window + 1..i.
    Returns [B, S, H, D].
    """
    batch, length, heads, dim = query.shape
    groups = key.shape[2]
    for tensor in (query, key, value):
        assert tensor.is_contiguous(), "flash_attention reads [B, S, H, D] as it lies in memory"
    out = torch.empty_like(query)
    windowed = window is not None and window < length
    grid = (triton.cdiv(length, _TILE), heads, batch)
    _attention_kernel[grid](
        query, key, value, query if sinks is None else sinks, out, scale * _LOG2E, length, heads,
        groups, window if windowed else length, D=dim, M=_TILE, N=_TILE, HAS_SINK=sinks is not None,
        num_warps=4, num_stages=3,
    )  # fmt: skip
    return out


@triton.jit
def _rotate_kernel(
    x, weight, cos, sin, row, length, heads, eps,
    D: tl.constexpr, HALF: tl.constexpr, TAIL: tl.constexpr, NORM: tl.constexpr, H: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * H + tl.arange(0, H)
    dims = tl.arange(0, HALF)
    inside = tl.broadcast_to((head < heads)[:, None], (H, HALF))
    position = token % length
    c = tl.load(cos + position * row + dims)[None, :].to(tl.float32)
    s = tl.load(sin + position * row + dims)[None, :].to(tl.float32)
    at = x + (token * heads + head[:, None]) * D + dims[None, :]
    a = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        squares = tl.sum(a * a, 1) + tl.sum(b * b, 1)
        if TAIL > 0:
            rest = tl.arange(0, TAIL)
            behind = tl.broadcast_to((head < heads)[:, None], (H, TAIL))
            rest_at = x + (token * heads + head[:, None]) * D + 2 * HALF + rest[None, :]
            t = tl.load(rest_at, mask=behind, other=0.0).to(tl.float32)
            squares += tl.sum(t * t, 1)
        scale = (1.0 / tl.sqrt(squares / D + eps))[:, None]
        a = a * scale * tl.load(weight + dims)[None, :].to(tl.float32)
        b = b * scale * tl.load(weight + HALF + dims)[None, :].to(tl.float32)
        if TAIL > 0:
            t = t * scale * tl.load(weight + 2 * HALF + rest)[None, :].to(tl.float32)
            tl.store(rest_at, t.to(x.dtype.element_ty), mask=behind)
    tl.store(at, (a * c - b * s).to(x.dtype.element_ty), mask=inside)
    tl.store(at + HALF, (b * c + a * s).to(x.dtype.element_ty), mask=inside)


def rotate_(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    half: int | None = None,
    norm: tuple[torch.Tensor, float] | None = None,
) -> torch.Tensor:
    """Rotary embedding in place: of [B, S, H, D] the first 2 half dimensions, as two halves, turned
    by the first half columns of cos, sin [S, >= half]; by default all of D.

    With a norm, (weight [D], eps), each head is first scaled to weight * x / sqrt(mean x^2 + eps).
    Half and what is left of D must be powers of two.
    """
    batch, length, heads, dim = x.shape
    half = dim // 2 if half is None else half
    tile = min(triton.next_power_of_2(heads), 64 if norm is None else 16)
    grid = (batch * length, triton.cdiv(heads, tile))
    weight, eps = (x, 0.0) if norm is None else norm
    _rotate_kernel[grid](
        x, weight, cos, sin, cos.stride(0), length, heads, eps,
        D=dim, HALF=half, TAIL=dim - 2 * half, NORM=norm is not None, H=tile,
    )  # fmt: skip
    return x
