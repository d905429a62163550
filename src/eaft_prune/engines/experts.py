"""The experts of any MoE family of transformers 5, grouped by expert and observable."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from eaft_prune.checkpoints.families.sliced_routers import KEPT
from eaft_prune.engines.packed import PackedWeight

NAME = "eaft_experts"
RECORDER = "eaft_recorder"  # attribute of an experts module

# called with ids, router weights and norms, each [N, K], of all N positions of a forward
Recorder = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]

TOKENS = 32768  # at a time: K times as many rows of activations are held


def experts_forward(
    module: Any, hidden_ND: torch.Tensor, ids_NK: torch.Tensor, gates_NK: torch.Tensor
) -> torch.Tensor:
    """sum over k of g_k f_k(x), the experts' matmuls run on tokens sorted by expert.

    Where the module carries an `eaft_recorder` it is told ids, weights and ||f_k(x)||_2 (float32,
    unweighted, bias included). Where it carries `eaft_kept`, ids are those of the experts kept.
    """
    kept = getattr(module, KEPT, None)
    if kept is not None:
        ids_NK = kept[ids_NK]
    inner = _fused if hidden_ND.device.type == "cuda" else _looped
    parts = [part.split(TOKENS) for part in (hidden_ND, ids_NK, gates_NK)]
    done = [inner(module, *part) for part in zip(*parts, strict=True)]
    recorder: Recorder | None = getattr(module, RECORDER, None)
    if recorder is not None:
        recorder(ids_NK, gates_NK, torch.cat([norms for _, norms in done]))
    return torch.cat([out for out, _ in done]) if len(done) > 1 else done[0][0]


def weight(module: Any, name: str, expert: int | None = None) -> torch.Tensor:
    """A projection as [E, in, out], or [in, out] of one expert; packed ones are dequantised."""
    held = getattr(module, name)
    packed = isinstance(held, PackedWeight)
    whole = held.dense if packed else lambda: held
    chosen: torch.Tensor = whole() if expert is None else held[expert]
    return chosen if packed or module.is_transposed else chosen.transpose(-2, -1)


def has_gate(module: Any) -> bool:
    """Whether its activation multiplies two halves; not every version of transformers says."""
    return getattr(module, "has_gate", True)


def first_projection(module: Any) -> str:
    """The projection before the activation: gate and up in one, or up alone."""
    return "gate_up_proj" if has_gate(module) else "up_proj"


def activated(module: Any, inner: torch.Tensor) -> torch.Tensor:
    """What comes between an expert's projections."""
    out: torch.Tensor = module._apply_gate(inner) if has_gate(module) else module.act_fn(inner)
    return out


def normed(module: Any, out: torch.Tensor) -> torch.Tensor:
    """An expert's output with the norm that some models put behind it."""
    behind = getattr(module, "has_post_expert_norm", False)
    return module.post_expert_norm(out) if behind else out


def _looped(
    module: Any, hidden_ND: torch.Tensor, ids_NK: torch.Tensor, gates_NK: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """On the CPU: one expert after the other, each on its rows alone."""
    n, k = ids_NK.shape
    order = torch.argsort(ids_NK.reshape(-1), stable=True)
    counts = torch.bincount(ids_NK.reshape(-1), minlength=module.num_experts).tolist()
    x = hidden_ND.index_select(0, order // k)
    parts = []
    for expert, rows in enumerate(x.split(counts)):
        if len(rows) > 0:
            inner = activated(module, _linear(module, first_projection(module), expert, rows))
            parts.append(normed(module, _linear(module, "down_proj", expert, inner)))
    out = torch.cat(parts)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order))
    norms = torch.linalg.vector_norm(out, dim=-1, dtype=torch.float32)[back].view(n, k)
    weighted = out.mul_(gates_NK.reshape(-1)[order][:, None].to(out.dtype))
    total = weighted.index_select(0, back).view(n, k, -1).sum(dim=1)
    return total.to(hidden_ND.dtype), norms


def _linear(module: Any, name: str, expert: int, x: torch.Tensor) -> torch.Tensor:
    matrix = weight(module, name, expert)
    if not module.has_bias:
        return torch.mm(x, matrix)
    return torch.addmm(getattr(module, f"{name}_bias")[expert], x, matrix)


def _fused(
    module: Any, hidden_ND: torch.Tensor, ids_NK: torch.Tensor, gates_NK: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """On CUDA: grouped products with one pass each between them, summed in float32."""
    from eaft_prune.engines.kernels import moe

    n, k = ids_NK.shape
    sorted_ids, order = torch.sort(ids_NK.reshape(-1).to(torch.int32), stable=True)
    ends = torch.searchsorted(
        sorted_ids, torch.arange(module.num_experts, device=order.device, dtype=torch.int32),
        right=True, out_int32=True,
    )  # fmt: skip
    position = torch.empty(n * k, dtype=torch.int32, device=order.device)
    position[order] = torch.arange(n * k, dtype=torch.int32, device=order.device)
    x = hidden_ND.index_select(0, order // k)
    grouped = torch.nn.functional.grouped_mm
    first = grouped(x, weight(module, first_projection(module)), offs=ends)
    down = grouped(_between(module, first, sorted_ids), weight(module, "down_proj"), offs=ends)
    bias = module.down_proj_bias if module.has_bias else None
    if getattr(module, "has_post_expert_norm", False):
        down, bias = normed(module, down if bias is None else down + bias[sorted_ids]), None
    return moe.combine(down, position.view(n, k), ids_NK, gates_NK, bias)


def _between(module: Any, first: torch.Tensor, sorted_ids: torch.Tensor) -> torch.Tensor:
    """Bias and activation of the first projection's output, in one pass for the common ones."""
    from eaft_prune.engines.kernels import moe

    if _is_gpt_oss(module):
        bias = module.gate_up_proj_bias
        return moe.clamped_swiglu(first, sorted_ids, bias, module.alpha, module.limit)
    if module.has_bias:
        first = first + getattr(module, f"{first_projection(module)}_bias")[sorted_ids]
    return moe.silu_gate(first) if _gates_by_silu(module) else activated(module, first)


def _is_gpt_oss(module: Any) -> bool:
    return hasattr(module, "alpha") and hasattr(module, "limit") and module.has_bias


def _gates_by_silu(module: Any) -> bool:
    from transformers.activations import SiLUActivation
    from transformers.integrations.moe import _default_apply_gate

    plain = getattr(type(module), "_apply_gate", None) is _default_apply_gate
    return plain and has_gate(module) and isinstance(module.act_fn, SiLUActivation | torch.nn.SiLU)
