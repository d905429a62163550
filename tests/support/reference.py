"""An outside reference: the whole pipeline written from docs/definitions.md alone.

Imports nothing of eaft_prune. Plain loops in float64 wherever the model itself does not decide, the
model being transformers' own eager code in float32. Rows come in file order, all of them serve
profiling and evaluation (packs.split=none, profile.seed=null, eval.seed=null).
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Mxfp4Config

ASSISTANT = re.compile(
    r"<\|start\|>assistant(?![^\s<])(?:(?!<\|start\|>|<\|message\|>).)*<\|message\|>"
    r"(?P<content>.*?)(?:<\|end\|>|<\|call\|>|<\|return\|>|\Z)",
    re.DOTALL,
)
Blocks = list[tuple[list[int], list[bool]]]  # token ids and scored positions of each block


@dataclass
class Tokens:
    """One model's view of the scored tokens of some blocks."""

    p: list[float]
    h: list[float]


@dataclass
class Routed(Tokens):
    """The same, with routing at the predictor: per layer, per token, (expert, gate, norm)."""

    layers: list[list[list[tuple[int, float, float]]]]


def load(path: Path) -> Any:
    """The checkpoint as transformers' eager float32 model."""
    model: Any = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        quantization_config=Mxfp4Config(dequantize=True),
    )
    return model.float().eval()


def tokenise(path: Path, packs: Mapping[str, Path]) -> dict[str, Blocks]:
    """Every row's ids with EOS behind them, and which of them are assistant content."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    out: dict[str, Blocks] = {}
    for name, file in packs.items():
        out[name] = []
        for text in pd.read_parquet(file)["text"]:
            spans = [match.span("content") for match in ASSISTANT.finditer(text)]
            coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            scored = [
                any(begin <= first and last <= end and first < last for begin, end in spans)
                for first, last in coded["offset_mapping"]
            ]
            out[name].append(([*coded["input_ids"], tokenizer.eos_token_id], [*scored, False]))
    return out


def cut(rows: Mapping[str, Blocks], pack: str, seq_len: int, count: int) -> Blocks:
    """The first `count` blocks of a pack, or of UNION: one row of each pack in turn."""
    if pack == "UNION":
        longest = max(len(part) for part in rows.values())
        order = [part[i] for i in range(longest) for part in rows.values() if i < len(part)]
    else:
        order = rows[pack]
    ids = [token for row, _ in order for token in row]
    scored = [flag for _, row in order for flag in row]
    assert len(ids) >= count * seq_len, "too few rows"
    blocks = []
    for b in range(count):
        here = slice(b * seq_len, (b + 1) * seq_len)
        blocks.append((ids[here], [False, *scored[here][1:]]))
    return blocks


@torch.no_grad()
def evaluate(model: Any, blocks: Blocks, top: int = 20) -> Tokens:
    """p_t = softmax(logits_{t-1})[x_t]; H_t of the top 20, renormalised, over ln 20."""
    tokens = Tokens([], [])
    for ids, scored in blocks:
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double()
        for t in range(1, len(ids)):
            if scored[t]:
                probabilities = torch.softmax(logits[t - 1], dim=-1)
                tokens.p.append(float(probabilities[ids[t]]))
                best = torch.sort(probabilities, descending=True).values[:top]
                q = (best / best.sum()).tolist()
                tokens.h.append(-sum(x * math.log(x) for x in q if x > 0) / math.log(top))
    return tokens


@torch.no_grad()
def profile(model: Any, blocks: Blocks) -> Routed:
    """`evaluate`, with what a hook on each MoE layer's input says of routing."""
    seen: dict[int, torch.Tensor] = {}

    def hook(layer: int) -> Any:
        def see(module: Any, arguments: tuple[torch.Tensor, ...]) -> None:
            seen[layer] = arguments[0].detach().reshape(-1, arguments[0].shape[-1])

        return see

    mlps = [layer.mlp for layer in model.model.layers]
    handles = [mlp.register_forward_pre_hook(hook(i)) for i, mlp in enumerate(mlps)]
    routed = Routed([], [], [[] for _ in mlps])
    for ids, scored in blocks:
        tokens = evaluate(model, [(ids, scored)])
        routed.p += tokens.p
        routed.h += tokens.h
        for t in range(1, len(ids)):
            if scored[t]:
                for layer, mlp in enumerate(mlps):
                    routed.layers[layer].append(route(model.config, mlp, seen[layer][t - 1]))
    for handle in handles:
        handle.remove()
    return routed


def route(config: Any, mlp: Any, x: torch.Tensor) -> list[tuple[int, float, float]]:
    """The chosen experts of one position: top-k logits, softmax over them, output norms."""
    x = x.double()
    logits = mlp.router.weight.double() @ x + mlp.router.bias.double()
    chosen = torch.argsort(logits, descending=True)[: config.num_experts_per_tok].tolist()
    gates = torch.softmax(logits[chosen], dim=0).tolist()
    out = []
    for expert, gate in zip(chosen, gates, strict=True):
        experts = mlp.experts
        both = x @ experts.gate_up_proj[expert].double() + experts.gate_up_proj_bias[expert]
        linear = both[1::2].clamp(-config.swiglu_limit, config.swiglu_limit)
        gated = both[0::2].clamp(max=config.swiglu_limit)
        inner = (linear + 1) * gated * torch.sigmoid(1.702 * gated)
        y = inner @ experts.down_proj[expert].double() + experts.down_proj_bias[expert]
        out.append((expert, gate, math.sqrt(sum(v * v for v in y.tolist()))))
    return out


def region_weight(kind: str, p: float, h: float, p_lo: float, h_lo: float, h_hi: float) -> float:
    """1 good, 0.25 uncertain, -2 conflict."""
    if kind == "strict":
        if h <= h_lo:
            return 1.0 if p >= p_lo else -2.0
        return 0.25
    if p <= p_lo and h <= h_lo:
        return -2.0
    return 0.25 if p <= p_lo and h >= h_hi else 1.0


# name -> saliency of (gate, norm), region kind or None, reduce
CRITERIA: dict[str, tuple[Any, str | None, str]] = {
    "eaft_reap": (lambda g, n: g * n, "strict", "sum"),
    "eaft_reap_mean": (lambda g, n: g * n, "strict", "mean"),
    "eaft_reap_policy": (lambda g, n: g * n, "policy", "sum"),
    "reap": (lambda g, n: g * n, None, "mean"),
    "reap_sum": (lambda g, n: g * n, None, "sum"),
    "ean": (lambda g, n: n, None, "sum"),
    "ean_mean": (lambda g, n: n, None, "mean"),
    "frequency": (lambda g, n: 1.0, None, "sum"),
}


def keep(
    trace: Routed, criterion: str, n_experts: int, keep_n: int, core_pos: int, core_count: int = 0
) -> list[list[int]]:
    """Sorted ids each layer keeps: the core by positive mass and by count, then by score."""
    saliency, kind, reduce = CRITERIA[criterion]
    p_lo, h_lo = np.quantile(trace.p, 0.15), np.quantile(trace.h, 0.15)
    h_hi = np.quantile(trace.h, 0.85)
    plan = []
    for layer in trace.layers:
        total, mass, count = [0.0] * n_experts, [0.0] * n_experts, [0] * n_experts
        for p, h, choices in zip(trace.p, trace.h, layer, strict=True):
            w = 1.0 if kind is None else region_weight(kind, p, h, p_lo, h_lo, h_hi)
            for expert, gate, norm in choices:
                value = w * saliency(gate, norm)
                total[expert] += value
                mass[expert] += max(value, 0.0)
                count[expert] += 1
        score = [
            total[e] / count[e] if reduce == "mean" and count[e] else total[e]
            for e in range(n_experts)
        ]
        kept = set(sorted(range(n_experts), key=lambda e: -mass[e])[:core_pos])
        kept |= set(sorted(range(n_experts), key=lambda e: -count[e])[:core_count])
        for expert in sorted(range(n_experts), key=lambda e: -score[e]):
            if len(kept) < keep_n:
                kept.add(expert)
        plan.append(sorted(kept))
    return plan


def prune(model: Any, plan: Sequence[Sequence[int]]) -> Any:
    """A smaller model in memory: the state dict sliced along the expert axis."""
    config = copy.deepcopy(model.config)
    config.num_local_experts = len(plan[0])
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    state = model.state_dict()
    for name in state:
        if ".mlp.router." in name or ".mlp.experts." in name:
            state[name] = state[name][list(plan[int(name.split(".")[2])])]
    smaller = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    smaller.load_state_dict(state)
    return smaller.eval()


def metrics(tokens: Tokens, base: Tokens) -> dict[str, float]:
    """The row of the results table, against the base model on the same tokens."""
    n = len(tokens.p)
    own = np.quantile(tokens.p, 0.15), np.quantile(tokens.h, 0.15)
    theirs = np.quantile(base.p, 0.15), np.quantile(base.h, 0.15)

    def conflict(p_q: float, h_q: float) -> float:
        return sum(p <= p_q and h <= h_q for p, h in zip(tokens.p, tokens.h, strict=True)) / n

    return {
        "ppl": math.exp(sum(-math.log(p) for p in tokens.p) / n),
        "mean_prob": sum(tokens.p) / n,
        "mean_entropy": sum(tokens.h) / n,
        "cc_rate": conflict(*own),
        "cc_rate_base_thr": conflict(*theirs),
        "js2d": js2d(base, tokens),
        "scored_tokens": n,
    }


def js2d(a: Tokens, b: Tokens) -> float:
    """Jensen-Shannon divergence in nats of two 160 x 120 histograms of (p, H)."""

    def histogram(tokens: Tokens) -> dict[tuple[int, int], float]:
        cells: dict[tuple[int, int], float] = {}
        for p, h in zip(tokens.p, tokens.h, strict=True):
            cell = min(int(p * 160), 159), min(int(h * 120), 119)
            cells[cell] = cells.get(cell, 0.0) + 1 / len(tokens.p)
        return cells

    p, q = histogram(a), histogram(b)
    total = 0.0
    for cell in {*p, *q}:
        x, y = p.get(cell, 0.0), q.get(cell, 0.0)
        for v in (x, y):
            if v > 0:
                total += 0.5 * v * math.log(2 * v / (x + y))
    return total


def slack(tokens: Tokens, base: Tokens, noise: float = 5e-6) -> dict[str, float]:
    """How far float32 noise can move what counts tokens: those that lie on a threshold or bin edge.

    Rows that repeat a phrase give tokens whose H agree to 1e-7, and the quantile falls between two.
    """

    def on(values: Sequence[float], edge: float) -> int:
        return sum(abs(v - edge) <= noise for v in values)

    out = {}
    for name, ruler in (("cc_rate", tokens), ("cc_rate_base_thr", base)):
        edges = np.quantile(ruler.p, 0.15), np.quantile(ruler.h, 0.15)
        out[name] = (on(tokens.p, edges[0]) + on(tokens.h, edges[1])) / len(tokens.p)
    moved = 0
    for side in (tokens, base):
        for values, bins in ((side.p, 160), (side.h, 120)):
            for v in values:
                edge = round(v * bins) / bins
                moved += 0 < edge < 1 and abs(v - edge) <= noise
    out["js2d"] = 2 * math.log(2) * moved / len(tokens.p)
    return out


class Limits(NamedTuple):
    """Of the gate; the PPL limit is the smaller of max_dppl and max_dppl_relative * PPL_base."""

    dppl: float
    dppl_relative: float
    dcc_rate: float
    dmean_prob: float
    js2d: float


LIMITS = Limits(0.25, 0.05, 0.002, 0.02, 0.02)  # near-lossless-v1


def gate(
    base: Mapping[str, float], pruned: Mapping[str, float], limits: Limits = LIMITS
) -> dict[str, tuple[float, float, bool]]:
    """The inequalities at one length: check -> value, limit, holds."""
    checks = {
        "dppl": (pruned["ppl"] - base["ppl"], limits.dppl),
        "dppl_relative": (pruned["ppl"] / base["ppl"] - 1, limits.dppl_relative),
        "dcc_rate": (pruned["cc_rate"] - base["cc_rate"], limits.dcc_rate),
        "dmean_prob": (pruned["mean_prob"] - base["mean_prob"], limits.dmean_prob),
        "js2d": (pruned["js2d"], limits.js2d),
    }
    return {name: (value, limit, abs(value) <= limit) for name, (value, limit) in checks.items()}
