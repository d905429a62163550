"""The demo model: gpt-oss's forward in plain PyTorch, made to train fast, and its MXFP4 rounding.

Module names are those of the published checkpoint, so writing it needs no renaming. Expert master
weights are float32 [expert, out, in]. Shapes: B batch, S sequence, T = B * S tokens, H hidden,
E experts, K experts per token, I expert intermediate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import (
    AuxRequest,
    BlockMask,
    create_block_mask,
    flex_attention,
)

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # magnitudes of the 4-bit float; bit 3 is the sign
E2M1_EDGES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)  # half way between neighbours
GROUP = 32  # weights that share one scale

Rope = tuple[Tensor, Tensor]  # cosines and sines [S, head_dim / 2]
Mask = BlockMask | Tensor  # of flex_attention, or additive [S, S]


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the demo model; every other constant is gpt-oss's own."""

    vocab_size: int = 4096
    hidden_size: int = 192
    intermediate_size: int = 128
    num_layers: int = 4
    num_experts: int = 32
    top_k: int = 4
    num_heads: int = 8
    num_kv_heads: int = 4
    head_dim: int = 32
    sliding_window: int = 128
    swiglu_alpha: float = 1.702
    swiglu_limit: float = 7.0
    rms_eps: float = 1e-5
    rope_theta: float = 150000.0
    yarn_factor: float = 32.0
    yarn_original: int = 4096
    yarn_beta_fast: float = 32.0
    yarn_beta_slow: float = 1.0
    expert_spread: float = 0.1  # how much experts of a layer differ before training; 1: independent

    def is_sliding(self, layer: int) -> bool:
        """Even layers attend to the last `sliding_window` positions only."""
        return layer % 2 == 0


# ---------------------------------------------------------------- MXFP4


def mxfp4_codes(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round the last dimension to MXFP4: codes [..., in/32, 32] and exponents [..., in/32].

    Value = (-1)^(code >> 3) * E2M1[code & 7] * 2^exponent. The exponent is the OCP one
    (floor(log2 max) - 2, which clips the top of the range) or one more, whichever has the smaller
    squared error in its group.
    """
    groups = weight.float().unflatten(-1, (-1, GROUP))
    largest = groups.abs().amax(-1, keepdim=True).clamp_min(2.0**-60)
    low = torch.floor(torch.log2(largest)) - 2
    edges = torch.tensor(E2M1_EDGES, device=weight.device)
    values = torch.tensor(E2M1, device=weight.device)
    codes, errors = [], []
    for exponent in (low, low + 1):
        scaled = groups * torch.exp2(-exponent)
        code = torch.bucketize(scaled.abs(), edges)
        error = (values[code] - scaled.abs()) * torch.exp2(exponent)
        codes.append(code + 8 * (scaled < 0))
        errors.append(error.square().sum(-1, keepdim=True))
    higher = errors[1] < errors[0]
    code = torch.where(higher, codes[1], codes[0])
    return code, (low + higher.float()).squeeze(-1)


def mxfp4_values(codes: Tensor, exponents: Tensor) -> Tensor:
    """The float32 weights that codes and exponents stand for, groups joined again."""
    values = torch.tensor(E2M1 + tuple(-v for v in E2M1), device=codes.device)
    return (values[codes] * torch.exp2(exponents)[..., None]).flatten(-2)


def mxfp4_pack(codes: Tensor, exponents: Tensor) -> tuple[Tensor, Tensor]:
    """Checkpoint bytes: blocks [..., in/32, 16], low nibble first, and e8m0 scales, bias 127."""
    codes = codes.to(torch.uint8)
    return codes[..., 0::2] | (codes[..., 1::2] << 4), (exponents + 127).to(torch.uint8)


def fake_quantise(weight: Tensor, amount: Tensor) -> Tensor:
    """Straight-through MXFP4: rounded values forward (amount 1) or none (0), identity backward."""
    rounded = mxfp4_values(*mxfp4_codes(weight.detach()))
    return weight + amount * (rounded - weight.detach())


# ---------------------------------------------------------------- layers


class Permute(torch.autograd.Function):
    """Rows in another order; the backward is a gather as well, not a scatter with atomics."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows[order]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad[inverse], None, None


def by_expert(
    x_TH: Tensor, ids_TK: Tensor, num_experts: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows [T K, H] sorted by expert, each's expert one-hot [T K, E], and the order there and back.

    One-hot so that a bias is a matmul: a gather's backward would be atomics on a few rows.
    """
    t, k = ids_TK.shape
    flat = ids_TK.flatten()
    order = flat.argsort(stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(t * k, device=x_TH.device))
    rows = Permute.apply(x_TH[:, None].expand(t, k, -1).reshape(t * k, -1), order, inverse)
    return rows, F.one_hot(flat[order], num_experts).to(x_TH.dtype), order, inverse


def dense(x: Tensor, layer: nn.Linear) -> Tensor:
    """A linear layer in the dtype of its input."""
    return F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))


def expert_matmul(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Rows sorted by expert times that expert's weight [E, out, in]."""
    if rows.dtype == torch.bfloat16:
        offsets = counts.cumsum(0).to(torch.int32)
        return F.grouped_mm(rows, weight.to(rows.dtype).transpose(1, 2), offs=offsets)
    pieces = rows.split(counts.tolist())
    return torch.cat([piece @ w.T for piece, w in zip(pieces, weight, strict=True)])


class RMSNorm(nn.Module):
    """Root mean square norm in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


class Attention(nn.Module):
    """Grouped-query attention with one learned sink logit per head.

    A sink adds exp(sink) to the softmax denominator, so the output is the plain one times
    sigmoid(logsumexp - sink); flex_attention returns the logsumexp.
    """

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.c = c
        self.q_proj = nn.Linear(c.hidden_size, c.num_heads * c.head_dim)
        self.k_proj = nn.Linear(c.hidden_size, c.num_kv_heads * c.head_dim)
        self.v_proj = nn.Linear(c.hidden_size, c.num_kv_heads * c.head_dim)
        self.o_proj = nn.Linear(c.num_heads * c.head_dim, c.hidden_size)
        self.sinks = nn.Parameter(torch.zeros(c.num_heads))

    def forward(self, x: Tensor, rope: Rope, mask: Mask) -> Tensor:
        b, s, _ = x.shape
        q, k, v = (
            dense(x, layer).view(b, s, -1, self.c.head_dim).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k, scale = rotate(q, rope), rotate(k, rope), self.c.head_dim**-0.5
        if isinstance(mask, BlockMask):
            out, aux = flex_attention(
                q,
                k,
                v,
                block_mask=mask,
                scale=scale,
                enable_gqa=True,
                return_aux=AuxRequest(lse=True),
            )
            assert aux.lse is not None, "it was asked for"
            lse = aux.lse
        else:
            repeat = self.c.num_heads // self.c.num_kv_heads
            k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
            logits = (q @ k.transpose(2, 3)).float() * scale + mask
            lse = logits.logsumexp(-1)
            out = logits.softmax(-1).to(v.dtype) @ v
        out = out * torch.sigmoid(lse - self.sinks[:, None])[..., None].to(out.dtype)
        return dense(out.transpose(1, 2).reshape(b, s, -1), self.o_proj)


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotary embedding, first half with second half, as gpt-oss in transformers does."""
    cos, sin = rope
    first, second = x.float().chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


def similar(count: int, *shape: int, spread: float) -> Tensor:
    """Normal weights of `count` experts: the first one plus `spread` times independent draws."""
    own = torch.randn(count, *shape)
    return own[:1] + spread * (own - own[:1])


class Experts(nn.Module):
    """Clamped SwiGLU experts; gate and up rows alternate."""

    quantised: Tensor  # 1: rounded weights in the forward, 0: the master weights

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.c = c
        e, h, i = c.num_experts, c.hidden_size, c.intermediate_size
        up = similar(e, 2 * i, h, spread=c.expert_spread)
        down = similar(e, h, i, spread=c.expert_spread)
        self.gate_up_proj = nn.Parameter(up * h**-0.5)
        self.gate_up_proj_bias = nn.Parameter(torch.zeros(e, 2 * i))
        self.down_proj = nn.Parameter(down * i**-0.5 * (2 * c.num_layers) ** -0.5)
        self.down_proj_bias = nn.Parameter(torch.zeros(e, h))
        self.register_buffer("quantised", torch.zeros(()), persistent=False)

    def forward(self, x_TH: Tensor, ids_TK: Tensor) -> Tensor:
        """Output of each chosen expert, not weighted: [T, K, H]."""
        rows, chosen, order, inverse = by_expert(x_TH, ids_TK, self.c.num_experts)
        counts = chosen.float().sum(0).long()
        up_weight = fake_quantise(self.gate_up_proj, self.quantised)
        down_weight = fake_quantise(self.down_proj, self.quantised)
        mixed = expert_matmul(rows, up_weight, counts)
        mixed = mixed + chosen @ self.gate_up_proj_bias.to(x_TH.dtype)
        gate = mixed[..., 0::2].clamp(max=self.c.swiglu_limit)
        up = mixed[..., 1::2].clamp(-self.c.swiglu_limit, self.c.swiglu_limit)
        hidden = (up + 1) * gate * torch.sigmoid(gate * self.c.swiglu_alpha)
        out = expert_matmul(hidden, down_weight, counts)
        out = out + chosen @ self.down_proj_bias.to(x_TH.dtype)
        unsorted: Tensor = Permute.apply(out, inverse, order)
        return unsorted.view(*ids_TK.shape, -1)


class MoE(nn.Module):
    """Router with bias, top-k before softmax, and the experts."""

    drop: Tensor  # [E], added to router logits: -inf takes an expert away

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.c = c
        self.router = nn.Linear(c.hidden_size, c.num_experts)
        self.experts = Experts(c)
        self.noise = (
            0.0  # training only: noisy top-k, so that close experts learn each other's work
        )
        self.dropout = 0.0  # training only: part of the experts that one sequence cannot use
        self.register_buffer("drop", torch.zeros(c.num_experts), persistent=False)

    def forward(self, x_BSH: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Weighted sum of the chosen experts, and the load-balancing loss (1 when uniform)."""
        logits = F.linear(x_BSH, self.router.weight, self.router.bias) + self.drop
        choice = logits
        if self.training and self.noise > 0:
            choice = choice + self.noise * torch.randn_like(choice)
        if self.training and self.dropout > 0:
            away = torch.rand_like(choice[:, :1]) < self.dropout
            choice = choice.masked_fill(away, -torch.inf)
        top, ids = choice.flatten(0, 1).topk(self.c.top_k, -1)
        gates = top.softmax(-1)
        out = self.experts(x_BSH.flatten(0, 1).to(dtype), ids)
        load = F.one_hot(ids, self.c.num_experts).float().mean((0, 1))
        balance = self.c.num_experts * (load * logits.softmax(-1).mean((0, 1))).sum()
        return (out.float() * gates[..., None]).sum(1).view_as(x_BSH), balance


class Block(nn.Module):
    """One decoder layer."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_eps)
        self.mlp = MoE(c)

    def forward(
        self, x: Tensor, rope: Rope, mask: Mask, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        x = x + self.self_attn(self.input_layernorm(x).to(dtype), rope, mask).float()
        out, balance = self.mlp(self.post_attention_layernorm(x), dtype)
        return x + out, balance


class Decoder(nn.Module):
    """Embedding, layers, final norm; the residual stream stays in float32."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.num_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_eps)

    @property
    def blocks(self) -> list[Block]:
        return [cast(Block, layer) for layer in self.layers]


class DemoModel(nn.Module):
    """gpt-oss for causal language modelling."""

    frequencies: Tensor  # [head_dim / 2], radians a position

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.c = c
        self.model = Decoder(c)
        self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for layer in self.model.blocks:
            layer.self_attn.o_proj.weight.data *= (2 * c.num_layers) ** -0.5
        nn.init.normal_(self.model.embed_tokens.weight, std=0.5)
        self.register_buffer("frequencies", yarn_frequencies(c), persistent=False)

    def forward(
        self, ids_BS: Tensor, masks: tuple[Mask, Mask], dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor]:
        """Logits in `dtype` and the mean load-balancing loss; `masks` = (sliding, full)."""
        angles = torch.arange(ids_BS.shape[1], device=ids_BS.device)[:, None] * self.frequencies
        scale = 0.1 * math.log(self.c.yarn_factor) + 1.0
        rope = (angles.cos() * scale, angles.sin() * scale)
        x, balances = self.model.embed_tokens(ids_BS), []
        for i, layer in enumerate(self.model.blocks):
            x, balance = layer(x, rope, masks[0 if self.c.is_sliding(i) else 1], dtype)
            balances.append(balance)
        logits = F.linear(self.model.norm(x).to(dtype), self.lm_head.weight.to(dtype))
        return logits, torch.stack(balances).mean()


def yarn_frequencies(c: ModelConfig) -> Tensor:
    """Inverse frequencies of YaRN without truncation, as transformers computes them."""
    half = c.head_dim // 2
    plain = c.rope_theta ** (-torch.arange(half, dtype=torch.float32) / half)

    def turn_dim(rotations: float) -> float:
        span = c.yarn_original / (rotations * 2 * math.pi)
        return c.head_dim * math.log(span) / (2 * math.log(c.rope_theta))

    low, high = max(turn_dim(c.yarn_beta_fast), 0), min(turn_dim(c.yarn_beta_slow), c.head_dim - 1)
    ramp = ((torch.arange(half, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return plain / c.yarn_factor * ramp + plain * (1 - ramp)


def dense_masks(length: int, window: int, device: str) -> tuple[Tensor, Tensor]:
    """Additive (sliding, full) causal masks [S, S]."""
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    full = torch.where(distance >= 0, 0.0, -torch.inf)
    return torch.where(distance < window, full, -torch.inf), full


def block_masks(length: int, window: int) -> tuple[BlockMask, BlockMask]:
    """(sliding, full) causal masks of flex_attention, made once per sequence length."""

    def full(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return q >= k

    def sliding(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & (q - k < window)

    make = torch.compile(create_block_mask)
    first, second = (make(f, None, None, length, length, device="cuda") for f in (sliding, full))
    return first, second
