"""Around the experts' grouped matmuls: rows gathered, activations, then bias, norm and sum."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _swiglu_kernel(
    gate_up, expert, bias, out, inner, alpha, limit, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * 2 * BLOCK + tl.arange(0, 2 * BLOCK)
    inside = columns < 2 * inner
    ids = tl.load(expert + rows).to(tl.int64)
    mask = tl.broadcast_to(inside[None, :], (ROWS, 2 * BLOCK))
    x = tl.load(gate_up + rows[:, None] * 2 * inner + columns[None, :], mask=mask, other=0.0)
    b = tl.load(bias + ids[:, None] * 2 * inner + columns[None, :], mask=mask, other=0.0)
    both = x.to(tl.float32) + b.to(tl.float32)
    gate, up = tl.split(tl.reshape(both, (ROWS, BLOCK, 2)))
    gate = tl.minimum(gate, limit)
    up = tl.minimum(tl.maximum(up, -limit), limit)
    value = (up + 1.0) * gate * tl.sigmoid(gate * alpha)
    half = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    kept = tl.broadcast_to((half < inner)[None, :], (ROWS, BLOCK))
    target = out + rows[:, None] * inner + half[None, :]
    tl.store(target, value.to(out.dtype.element_ty), mask=kept)


def clamped_swiglu(
    gate_up_MI: torch.Tensor,
    expert_M: torch.Tensor,
    bias_EI: torch.Tensor,
    alpha: float,
    limit: float,
) -> torch.Tensor:
    """(up + 1) gate sigmoid(alpha gate) of gate_up + bias[expert], gate and up interleaved.

    gate is clamped from above, up on both sides, by limit; [M, 2I] -> [M, I].
    """
    m, double = gate_up_MI.shape
    out = gate_up_MI.new_empty(m, double // 2)
    rows = 4 if m % 4 == 0 else 1
    block = min(1024, triton.next_power_of_2(double // 2))
    grid = (m // rows, triton.cdiv(double // 2, block))
    _swiglu_kernel[grid](
        gate_up_MI, expert_M, bias_EI, out, double // 2, alpha, limit, ROWS=rows, BLOCK=block
    )
    return out


@triton.jit
def _silu_gate_kernel(gate_up, out, inner, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = tl.broadcast_to((columns < inner)[None, :], (ROWS, BLOCK))
    at = gate_up + rows[:, None] * 2 * inner + columns[None, :]
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + inner, mask=inside, other=0.0).to(tl.float32)
    value = (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty)
    tl.store(out + rows[:, None] * inner + columns[None, :], value, mask=inside)


def silu_gate(gate_up_MI: torch.Tensor) -> torch.Tensor:
    """up gate sigmoid(gate) of halves gate and up, rounded once; [M, 2I] -> [M, I]."""
    m, double = gate_up_MI.shape
    out = gate_up_MI.new_empty(m, double // 2)
    rows = 4 if m % 4 == 0 else 1
    block = min(1024, triton.next_power_of_2(double // 2))
    grid = (m // rows, triton.cdiv(double // 2, block))
    _silu_gate_kernel[grid](gate_up_MI, out, double // 2, ROWS=rows, BLOCK=block)
    return out


@triton.jit
def _combine_kernel(
    down, position, expert, weights, bias, out, norms, hidden,
    K: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < hidden
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(K):
        row = tl.load(position + token * K + k).to(tl.int64)
        y = tl.load(down + row * hidden + columns, mask=inside, other=0.0).to(tl.float32)
        if BIAS:
            ident = tl.load(expert + token * K + k).to(tl.int64)
            y += tl.load(bias + ident * hidden + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(norms + token * K + k, tl.sqrt(tl.sum(y * y)))
        total += tl.load(weights + token * K + k).to(tl.float32) * y
    tl.store(out + token * hidden + columns, total.to(out.dtype.element_ty), mask=inside)


def combine(
    down_MH: torch.Tensor,
    position_NK: torch.Tensor,
    ids_NK: torch.Tensor,
    gates_NK: torch.Tensor,
    bias_EH: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """sum_k g_k y_k and ||y_k||_2 with y = down[position] + bias[expert], if any, in float32.

    position[n, k] is the row of `down` that holds token n's k-th expert. Returns [N, H] and
    float32 [N, K].
    """
    n, k = ids_NK.shape
    hidden = down_MH.shape[1]
    out = down_MH.new_empty(n, hidden)
    norms = torch.empty(n, k, dtype=torch.float32, device=down_MH.device)
    block = triton.next_power_of_2(hidden)
    _combine_kernel[(n,)](
        down_MH, position_NK, ids_NK, gates_NK, down_MH if bias_EH is None else bias_EH, out, norms,
        hidden, K=k, BIAS=bias_EH is not None, BLOCK=block, num_warps=8 if block >= 2048 else 4,
    )  # fmt: skip
    return out, norms
