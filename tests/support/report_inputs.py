"""Realistic report inputs: Beta-distributed p, H falling with p, candidates as noisy bases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from support.gates import intervals

from eaft_prune.config import GateSettings
from eaft_prune.core.outcome import Selection
from eaft_prune.core.types import EvalKey, Evaluation, ExpertScores, KeepPlan, TokenScores
from eaft_prune.core.verdict import Changes, Comparison
from eaft_prune.maths.metrics import pack_report
from eaft_prune.stages.gate import gate

PACKS = ("reasoning_style", "tool_agentic", "calib_prompt", "UNION")
SEQ_LENS = (1024, 2048)
GATE = GateSettings(
    name="near_lossless_v1", seq_lens=SEQ_LENS, max_dppl=0.25, max_dppl_relative=0.05,
    max_dcc_rate=0.002, max_dmean_prob=0.02, max_js2d=0.02,
)  # fmt: skip
FACTS = {
    "command": "python -m eaft_prune model=gpt_oss_20b packs=harmony_calib_v2 pruning.keep_n=24",
    "code": "4f1c2ab (clean)",
    "seconds": 1_284.2,
    "model": {
        "name": "openai/gpt-oss-20b",
        "digest": "sha256:9b1f0e6cf4a2d3b58e7710c6ad94fe2188d0c3a5b2e4f60718293a4b5c6d7e8f",
        "layers": 24,
        "experts": 32,
    },
    "plan": {"digest": "sha256:17c0aa52", "keep_n": 24, "criterion": "eaft_reap"},
    "packs": {name: f"sha256:{i}f3e" for i, name in enumerate(PACKS[:-1])},
    "replay": [
        "python -m eaft_prune task=profile",
        "python -m eaft_prune task=evaluate",
    ],
}


def token_scores(rng: np.random.Generator, n: int, hardness: float) -> TokenScores:
    """n tokens of a confident model; hardness in [0, 1] shifts mass from p = 1 downward."""
    easy = rng.random(n) > hardness
    doubt = np.where(easy, 10 ** -rng.gamma(4.0, 0.75, n), rng.beta(1.3, 0.75, n))
    p = (1 - doubt).clip(1e-7, 1)
    entropy = (doubt**0.7 * rng.beta(9, 12, n) * (1.5 - 0.5 * doubt)).clip(0, 1)
    wrong = rng.random(n) < 0.012  # confidently wrong
    p = np.where(wrong, rng.beta(0.6, 20, n).clip(1e-7, 1), p)
    entropy = np.where(wrong, 0.002 * rng.random(n), entropy)
    blocks = np.sort(rng.integers(0, max(2, n // 300), n))
    return TokenScores(
        np.log(p).astype(np.float32), entropy.astype(np.float32), blocks.astype(np.int32)
    )


def noisy(rng: np.random.Generator, base: TokenScores, damage: float) -> TokenScores:
    """The scores of a model that lost some experts; damage 0 returns the base's."""
    p = base.p_T.clip(1e-7, 1 - 1e-7)
    logit = np.log(p / (1 - p)) + damage * (rng.standard_t(4, len(p)) - 0.3)
    logp = -np.log1p(np.exp(-logit))
    entropy = base.entropy_T + damage * 0.12 * base.entropy_T * rng.standard_normal(len(p))
    if damage == 0:
        return base
    return TokenScores(logp.astype(np.float32), entropy.clip(0, 1).astype(np.float32), base.block_T)


def comparison(
    damages: Mapping[str, float],
    *,
    packs: Sequence[str] = PACKS,
    seq_lens: Sequence[int] = SEQ_LENS,
    tokens: int = 3_000,
    base: str = "base",
    seed: int = 0,
) -> Comparison:
    """Candidates by label and damage, judged by near-lossless-v1 on the last pack."""
    rng = np.random.default_rng(seed)
    keys: list[EvalKey] = [(pack, seq_len) for pack in packs for seq_len in seq_lens]
    scores = {
        key: token_scores(rng, tokens, 0.42 + 0.2 * packs.index(key[0]) / len(packs))
        for key in keys
    }
    digests = {key: f"blocks-{key[0]}-{key[1]}" for key in keys}
    rows = {key: found.block_T for key, found in scores.items()}
    evaluations = [Evaluation(base, "sha256:base", None, scores, rows, digests, {})]
    for label, damage in damages.items():
        other = {key: noisy(rng, scores[key], damage) for key in keys}
        evaluations.append(Evaluation(label, f"sha256:{label}", None, other, rows, digests, {}))
    reports = {
        e.model: {key: pack_report(e.scores[key], scores[key], 0.15) for key in keys}
        for e in evaluations
    }
    settings = GATE.model_copy(update={"pack": packs[-1], "seq_lens": tuple(seq_lens)})
    found: dict[str, dict[EvalKey, Changes]] = {}
    for other in evaluations[1:]:
        both = {key: intervals(scores[key], other.scores[key], 0.15, settings) for key in keys}
        found[other.model] = {key: change for key, change in both.items() if change is not None}
    verdicts = {
        label: gate(settings, reports[base], reports[label], found[label]) for label in damages
    }
    return Comparison(evaluations[0], tuple(evaluations[1:]), reports, verdicts, found)


def selection(layers: int = 24, experts: int = 32, keep_n: int = 24, seed: int = 0) -> Selection:
    """Long-tailed scores and loads; the best two by count are core, the rest is cut by score."""
    rng = np.random.default_rng(seed)
    strength = rng.gamma(1.6, 1.0, (layers, experts))
    count: NDArray[np.int64] = (strength * 4_000 * rng.gamma(6, 1 / 6, strength.shape)).astype(
        np.int64
    )
    score = strength * 900 * rng.gamma(5, 1 / 5, strength.shape) - rng.gamma(1.2, 160, count.shape)
    ranking = np.where(count >= np.sort(count)[:, -2:-1], np.inf, score)
    kept = tuple(tuple(sorted(row.tolist())) for row in np.argsort(-ranking)[:, :keep_n])
    tokens = {"good": 61_400, "uncertain": 85_100, "conflict": 3_500}
    scores = ExpertScores(score, score.clip(0), count, tokens, score.clip(0)[None])
    return Selection("eaft_reap", scores, KeepPlan(kept, experts), {"keep_n": keep_n})
