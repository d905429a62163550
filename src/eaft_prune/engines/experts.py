"""The experts of any MoE family of transformers 5, grouped by expert and observable."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

NAME = "eaft_experts"
RECORDER = "eaft_recorder"  # attribute of an experts module

# called with expert ids [N, K], gates [N, K] and norms [N, K] of all N positions of a forward
Recorder = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]


def experts_forward(
    module: Any, hidden_ND: torch.Tensor, ids_NK: torch.Tensor, gates_NK: torch.Tensor
) -> torch.Tensor:
    """sum over k of g_k f_k(x), the experts' matmuls run on tokens sorted by expert.

    Where the module carries an `eaft_recorder` it is told ids, gates and ||f_k(x)||_2 (float32,
    unweighted, bias included).
    """
    n, k = ids_NK.shape
    order = torch.argsort(ids_NK.reshape(-1), stable=True)
    sorted_ids = ids_NK.reshape(-1)[order]
    counts_E = torch.bincount(sorted_ids, minlength=module.num_experts)
    x = hidden_ND.index_select(0, order // k)
    out = (_looped if x.device.type == "cpu" else _grouped)(module, x, sorted_ids, counts_E)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    recorder: Recorder | None = getattr(module, RECORDER, None)
    if recorder is not None:
        norms = torch.linalg.vector_norm(out, dim=-1, dtype=torch.float32)
        recorder(ids_NK, gates_NK, norms[back].view(n, k))
    weighted = out.mul_(gates_NK.reshape(-1)[order][:, None].to(out.dtype))
    return weighted.index_select(0, back).view(n, k, -1).sum(dim=1).to(hidden_ND.dtype)


def _looped(
    module: Any, x: torch.Tensor, sorted_ids: torch.Tensor, counts_E: torch.Tensor
) -> torch.Tensor:
    parts = []
    start = 0
    for expert, count in enumerate(counts_E.tolist()):
        if count == 0:
            continue
        rows = x[start : start + count]
        inner = module._apply_gate(_linear(module, "gate_up_proj", expert, rows))
        parts.append(_linear(module, "down_proj", expert, inner))
        start += count
    return torch.cat(parts)


def _linear(module: Any, name: str, expert: int, x: torch.Tensor) -> torch.Tensor:
    weight = getattr(module, name)[expert]
    if not module.is_transposed:
        weight = weight.t()
    if not module.has_bias:
        return torch.mm(x, weight)
    return torch.addmm(getattr(module, f"{name}_bias")[expert], x, weight)


def _grouped(
    module: Any, x: torch.Tensor, sorted_ids: torch.Tensor, counts_E: torch.Tensor
) -> torch.Tensor:
    ends = torch.cumsum(counts_E, 0).to(torch.int32)
    inner = module._apply_gate(_grouped_linear(module, "gate_up_proj", x, sorted_ids, ends))
    return _grouped_linear(module, "down_proj", inner, sorted_ids, ends)


def _grouped_linear(
    module: Any, name: str, x: torch.Tensor, sorted_ids: torch.Tensor, ends: torch.Tensor
) -> torch.Tensor:
    weight = getattr(module, name)
    if not module.is_transposed:
        weight = weight.transpose(-2, -1)
    out = torch.nn.functional.grouped_mm(x, weight, offs=ends)
    if module.has_bias:
        out = out + getattr(module, f"{name}_bias")[sorted_ids]
    return out
