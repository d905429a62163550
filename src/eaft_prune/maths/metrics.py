"""Every metric of a comparison: what it is, which change of it is judged, and how it is shown.

One entry of METRICS is all that a metric takes; intervals, gate, reports and tracking read them
here. Its limit stands in conf/gate: under the key that the entry names, else in `gate.metrics`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from eaft_prune.core.types import TokenScores, UserError
from eaft_prune.core.verdict import PackReport
from eaft_prune.maths.divergence import Apart, js2d_corrected
from eaft_prune.maths.formulas import (
    cc_rate,
    cc_rate_below,
    check_scores,
    perplexity,
    thresholds,
)
from eaft_prune.maths.influence import Ints, Values, of_cc_rate, of_mean
from eaft_prune.maths.kl import kl_max, kl_mean, kl_quantile, rms_dp, top1_flips

PerToken = NDArray[np.floating] | NDArray[np.bool_]


@dataclass(frozen=True)
class Metric:
    """One number of a model's token scores, of which candidate minus base is judged.

    Mostly the mean of `per_token`. Else `value` gives it, of (scores, base's scores, cc_quantile),
    and `influence` how far each row pulls it, of (scores, row_T, cc_quantile). A `distance` is a
    number of both models, 0 where they are equal: it is its own change, with its influence.
    """

    name: str  # of the number; its change is d<name>
    label: str  # head of its columns; empty: only its change is kept, and no report shows it
    meaning: str  # a sentence for people
    per_token: Callable[[TokenScores], PerToken] | None = None
    better: Literal["lower", "higher"] | None = None
    decimals: int = 4
    value: Callable[[TokenScores, TokenScores, float], float] | None = None
    influence: Callable[[TokenScores, Ints, float], Values] | None = None
    distance: Callable[[TokenScores, TokenScores, Ints], Apart] | None = None
    burst: float = 0.0  # of a share of rare tokens: what one conversation may hold, none having any
    needs: Literal["kl_T", "same_top_T"] | None = None  # of the scores of a distance
    place: Literal["columns", "divergence"] = "columns"  # the table that shows it
    limit: str | None = None  # the gate's key; None: `gate.metrics` holds it
    relative_limit: str | None = None  # the gate's key of a limit as a share of the base's number

    def __post_init__(self) -> None:
        own = self.value is not None and self.influence is not None
        if [self.per_token is not None, own, self.distance is not None].count(True) != 1:
            raise ValueError(
                f"metric {self.name}: give it per_token, or value and influence, or distance"
            )

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
        """The number itself."""
        if self.per_token is not None:
            return float(np.mean(self.per_token(scores), dtype=np.float64))
        assert self.value is not None, f"{self.name} has no value"
        return self.value(scores, base, cc_quantile)

    def pull(self, scores: TokenScores, row_T: Ints, cc_quantile: float) -> Values:
        """How far each row pulls the number, [n] with mean 0."""
        if self.per_token is not None:
            return of_mean(self.per_token(scores), row_T)
        assert self.influence is not None, f"{self.name} is a distance"
        return self.influence(scores, row_T, cc_quantile)

    def delta(self, base: PackReport, candidate: PackReport) -> float:
        """What the plain verdict judges: candidate - base, or the distance."""
        apart = 0.0 if self.distance is not None else base[self.name]
        return candidate[self.name] - apart


def _nll(scores: TokenScores) -> Values:
    return -scores.logp_T.astype(np.float64)


def _ppl_influence(scores: TokenScores, row_T: Ints, cc_quantile: float) -> Values:
    return perplexity(scores.logp_T) * of_mean(_nll(scores), row_T)


PPL = Metric(
    "ppl", "PPL", "Perplexity, exp of the mean -ln p over scored tokens; 1 is perfect.",
    better="lower", decimals=3,
    value=lambda scores, base, q: perplexity(scores.logp_T), influence=_ppl_influence,
    limit="max_dppl", relative_limit="max_dppl_relative",
)  # fmt: skip
JS2D = Metric(
    "js2d", "JS2D",
    "Jensen-Shannon divergence between the two models' joint histograms of (p, H), in nats: "
    "0 is identical, ln 2 disjoint.",
    distance=js2d_corrected, limit="max_js2d",
)  # fmt: skip


def _kl(
    name: str, label: str, meaning: str, of: Callable[[TokenScores, TokenScores, Ints], Apart]
) -> Metric:
    return Metric(
        name, label, f"{meaning}.", better="lower", distance=of, needs="kl_T", place="divergence"
    )


METRICS = (
    PPL,
    Metric("nll", "", "Mean -ln p over scored tokens, in nats.", _nll, "lower"),
    Metric(
        "cc_rate", "CC rate",
        "Share of confident conflicts: tokens whose p and H are both among the model's own "
        "lowest, so it was sure and wrong.",
        better="lower",
        value=lambda scores, base, q: cc_rate(scores.p_T, scores.entropy_T, q),
        influence=of_cc_rate, burst=0.2, limit="max_dcc_rate",
    ),
    Metric(
        "mean_prob", "mean p", "Mean probability given to the token that came.",
        lambda scores: scores.p_T, "higher", limit="max_dmean_prob",
    ),
    Metric(
        "mean_entropy", "mean H",
        "Mean entropy of the 20 likeliest tokens, scaled to [0, 1]: 0 is certain, 1 undecided.",
        lambda scores: scores.entropy_T,
    ),
    JS2D,
    _kl("kl_mean", "mean KL", "Mean KL of the base to the candidate, in nats", kl_mean),
    *(
        _kl(f"kl_p{name}", f"{label} KL", f"The KL that {label} of the tokens do not exceed",
            kl_quantile(share))
        for name, label, share in (
            ("50", "median", 0.5), ("90", "90%", 0.9), ("95", "95%", 0.95), ("99", "99%", 0.99),
            ("999", "99.9%", 0.999),
        )
    ),
    _kl("kl_max", "maximum KL", "The KL of the worst token", kl_max),
    Metric(
        "top1_flips", "top-1 flips",
        "Share of tokens whose likeliest successor is another than the base's.",
        better="lower", distance=top1_flips, needs="same_top_T", place="divergence",
    ),
    Metric(
        "rms_dp", "RMS Δ p", "Root of the mean square of the change of p.",
        better="lower", distance=rms_dp, place="divergence",
    ),
)  # fmt: skip
DIVERGENCE = tuple(metric for metric in METRICS if metric.place == "divergence")


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


def distances(
    base: TokenScores,
    other: TokenScores,
    row_T: NDArray[np.integer],
    metrics: Sequence[Metric] = METRICS,
) -> dict[str, Apart]:
    """How far two models are apart, by every metric that says so; 0 of a model from itself.

    What was not measured is left out.
    """
    rows = np.unique(row_T, return_inverse=True)[1]
    itself = other is base
    return {
        metric.name: Apart(0.0, None, 0.0) if itself else metric.distance(base, other, rows)
        for metric in metrics
        if metric.distance is not None and not (itself and metric.place == "divergence")
        if metric.needs is None or getattr(other, metric.needs) is not None
    }


def pack_report(
    scores: TokenScores,
    base: TokenScores,
    cc_quantile: float,
    metrics: Sequence[Metric] = METRICS,
    row_T: NDArray[np.integer] | None = None,
    apart: Mapping[str, Apart] | None = None,
) -> PackReport:
    """All metrics of `scores`, with `base` (the base model on the same tokens) as reference.

    row_T: the conversation of every token; None: every block is taken for one. apart: their
    `distances`, where they are known.
    """
    check_scores(scores, "candidate")
    check_scores(base, "base")
    if len(scores) != len(base) or not np.array_equal(scores.block_T, base.block_T):
        raise ValueError(
            f"evaluations of different tokens cannot be compared: {len(base)} and {len(scores)}"
        )
    row_T = scores.block_T if row_T is None else row_T
    if apart is None:
        apart = distances(base, scores, row_T, metrics)
    found = {
        metric.name: metric.of(scores, base, cc_quantile)
        for metric in metrics
        if metric.label and metric.distance is None
    }
    corrected = {name: one.value for name, one in apart.items()}
    plain = apart["js2d"].plain
    assert plain is not None, "JS2D is known without its correction too"
    return PackReport(
        ppl=found.pop("ppl"),
        mean_prob=found.pop("mean_prob"),
        mean_entropy=found.pop("mean_entropy"),
        cc_rate=found.pop("cc_rate"),
        cc_rate_base_thr=cc_rate_below(
            scores.p_T, scores.entropy_T, *thresholds(base.p_T, base.entropy_T, cc_quantile)
        ),
        js2d=plain,
        js2d_corrected=corrected.pop("js2d"),
        scored_tokens=len(scores),
        blocks=len(np.unique(scores.block_T)),
        rows=len(np.unique(row_T)),
        further={**found, **corrected},
    )
