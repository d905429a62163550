"""Every metric of a comparison: what it is, which change of it is judged, and how it is shown.

One entry of METRICS is all that a metric takes; intervals, gate, reports and tracking read them
here. Its limit stands in conf/gate: under the key that the entry names, else in `gate.metrics`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Literal

import numpy as np

from eaft_prune.core.types import TokenScores, UserError
from eaft_prune.core.verdict import PackReport
from eaft_prune.maths.divergence import Corrected, js2d, js2d_corrected
from eaft_prune.maths.draws import Draws, Values
from eaft_prune.maths.formulas import (
    cc_rate,
    check_scores,
    kl_top,
    perplexity,
    thresholds,
    top1_agreement,
)


@dataclass(frozen=True)
class Metric:
    """One number of a model's token scores, of which candidate minus base is judged.

    `per_draw` gives it for every draw of blocks, [R]. `value` gives it for the blocks as they are,
    of (scores, base's scores, cc_quantile), where that has a formula of its own. A `distance` is a
    number of both models, 0 where they are equal: it is its own change, estimated with its error.
    """

    name: str  # of the number; its change is d<name>
    label: str  # head of its columns; empty: only its change is kept, and no report shows it
    meaning: str  # a sentence for people
    per_draw: Callable[[Draws], Values] | None = None  # None: of a distance alone
    better: Literal["lower", "higher"] | None = None
    decimals: int = 4
    value: Callable[[TokenScores, TokenScores, float], float] | None = None
    distance: Callable[[TokenScores, TokenScores], Corrected] | None = None
    limit: str | None = None  # the gate's key; None: `gate.metrics` holds it
    relative_limit: str | None = None  # the gate's key of a limit as a share of the base's number

    def __post_init__(self) -> None:
        if (self.per_draw is None) == (self.distance is None):
            raise ValueError(f"metric {self.name}: give it one of per_draw and distance")

    @property
    def change(self) -> str:
        """The gate's name for what it checks."""
        return f"d{self.name}" if self.distance is None else self.name

    @property
    def change_label(self) -> str:
        return f"Δ {self.label}" if self.distance is None else self.label

    @property
    def relative_change(self) -> str:
        """Its change as a share of the base's number."""
        return f"{self.change}_relative"

    @property
    def sentence(self) -> str:
        """What it means, and which way is better."""
        return self.meaning + (f" {self.better.capitalize()} is better." if self.better else "")

    def of(self, scores: TokenScores, base: TokenScores, cc_quantile: float) -> float:
        """The number, on the blocks as they are."""
        if self.value is not None:
            return self.value(scores, base, cc_quantile)
        if self.distance is not None:
            return self.distance(base, scores).value
        return float(self.drawn(Draws.once(scores, cc_quantile))[0])

    def drawn(self, draws: Draws) -> Values:
        """The number for every draw of blocks, [R]."""
        assert self.per_draw is not None, f"{self.name} is a distance"
        return self.per_draw(draws)

    def delta(self, base: PackReport, candidate: PackReport) -> float:
        """What the plain verdict judges: candidate - base, or the distance."""
        apart = 0.0 if self.distance is not None else base[self.name]
        return candidate[self.name] - apart


def _nll(draws: Draws) -> Values:
    return draws.mean(-draws.logp_T)


def _cc_rate(draws: Draws) -> Values:
    p, h, q = draws.p_T, draws.entropy_T, draws.cc_quantile
    p_q, h_q = draws.quantile(p, q), draws.quantile(h, q)
    near = np.flatnonzero((p <= p_q.max()) & (h <= h_q.max()))  # no other token can conflict
    hits_R = np.zeros(len(draws.weights_RB))
    for part in np.array_split(near, len(near) // 2048 + 1):  # bounds the memory
        hit = (p[part] <= p_q[:, None]) & (h[part] <= h_q[:, None])
        hits_R += np.sum(hit * draws.weights_RB[:, draws.block_T[part]], axis=1)
    return np.asarray(hits_R / draws.tokens_R)


def _own_cc_rate(scores: TokenScores, base: TokenScores, cc_quantile: float) -> float:
    p, h = scores.p_T, scores.entropy_T
    return cc_rate(p, h, *thresholds(p, h, cc_quantile))


PPL = Metric(
    "ppl", "PPL", "Perplexity, exp of the mean -ln p over scored tokens; 1 is perfect.",
    lambda draws: np.exp(_nll(draws)), "lower", 3,
    lambda scores, base, q: perplexity(scores.logp_T),
    limit="max_dppl", relative_limit="max_dppl_relative",
)  # fmt: skip
JS2D = Metric(
    "js2d", "JS2D",
    "Jensen-Shannon divergence between the two models' joint histograms of (p, H), in nats: "
    "0 is identical, ln 2 disjoint.",
    value=lambda scores, base, q: js2d(base, scores), distance=js2d_corrected,
    limit="max_js2d",
)  # fmt: skip
METRICS = (
    PPL,
    Metric("nll", "", "Mean -ln p over scored tokens, in nats.", _nll, "lower"),
    Metric(
        "cc_rate", "CC rate",
        "Share of confident conflicts: tokens whose p and H both lie under the model's own "
        "thresholds, so it was sure and wrong.",
        _cc_rate, "lower", value=_own_cc_rate, limit="max_dcc_rate",
    ),
    Metric(
        "mean_prob", "mean p", "Mean probability given to the token that came.",
        lambda draws: draws.mean(draws.p_T), "higher",
        value=lambda scores, base, q: float(np.mean(scores.p_T)), limit="max_dmean_prob",
    ),
    Metric(
        "mean_entropy", "mean H",
        "Mean entropy of the 20 likeliest tokens, scaled to [0, 1]: 0 is certain, 1 undecided.",
        lambda draws: draws.mean(draws.entropy_T),
        value=lambda scores, base, q: float(np.mean(scores.entropy_T, dtype=np.float64)),
    ),
    JS2D,
)  # fmt: skip


def with_metrics(places: Iterable[str]) -> tuple[Metric, ...]:
    """METRICS, and after them those of the user's own that `places` name, each once."""
    own = [metric_at(place) for place in dict.fromkeys(places) if ":" in place]
    names = [*PackReport.__dataclass_fields__, "nll", *(metric.name for metric in own)]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"gate.metrics: {', '.join(twice)} is there already: rename your metric")
    return (*METRICS, *own)


def metric_at(place: str) -> Metric:
    """The metric that `gate.metrics` calls so: a name of METRICS, or `module:name`.

    Raises UserError where there is none.
    """
    known = {metric.name: metric for metric in METRICS if metric.label}
    if ":" not in place:
        if place not in known:
            raise UserError(
                f"gate.metrics names {place!r}; it takes {', '.join(known)} or module:name"
            )
        return known[place]
    module, _, name = place.partition(":")
    try:
        found = getattr(import_module(module), name)
    except Exception as error:  # whatever the user's module raises
        why = f"{type(error).__name__}: {error}"
        raise UserError(f"gate.metrics names {place!r}, which cannot be loaded: {why}") from error
    if not isinstance(found, Metric):
        raise UserError(
            f"gate.metrics names {place!r}: that is a {type(found).__name__}, no Metric"
        )
    return found


def pack_report(
    scores: TokenScores,
    base: TokenScores,
    cc_quantile: float,
    metrics: Sequence[Metric] = METRICS,
) -> PackReport:
    """All metrics of `scores`, with `base` (the base model on the same tokens) as reference."""
    check_scores(scores, "candidate")
    check_scores(base, "base")
    if len(scores) != len(base) or not np.array_equal(scores.block_T, base.block_T):
        raise ValueError(
            f"evaluations of different tokens cannot be compared: {len(base)} and {len(scores)}"
        )
    kept = base.top_ids_TK is not None and scores.top_ids_TK is not None
    found = {
        metric.name: metric.of(scores, base, cc_quantile) for metric in metrics if metric.label
    }
    return PackReport(
        ppl=found.pop("ppl"),
        mean_prob=found.pop("mean_prob"),
        mean_entropy=found.pop("mean_entropy"),
        cc_rate=found.pop("cc_rate"),
        cc_rate_base_thr=cc_rate(
            scores.p_T, scores.entropy_T, *thresholds(base.p_T, base.entropy_T, cc_quantile)
        ),
        js2d=found.pop("js2d"),
        js2d_corrected=js2d_corrected(base, scores).value,
        scored_tokens=len(scores),
        blocks=len(np.unique(scores.block_T)),
        kl_top=kl_top(base, scores) if kept else None,
        top1_agreement=top1_agreement(base, scores) if kept else None,
        further=found,
    )
