"""The divergence table, in the layout in which makers of quantised models publish theirs."""

from __future__ import annotations

from collections.abc import Sequence

from eaft_prune.maths.metrics import DIVERGENCE, PPL, Metric
from eaft_prune.report.summary import CandidateSummary, Row
from eaft_prune.report.text import number

HEADS = ("pack", "length")
NOTE = (
    "KL is in nats, of the base to the candidate over the base's likeliest tokens and one class of "
    "all others: a lower bound of that over the whole vocabulary. Bounds are over "
    "conversations; a maximum has none"
)
MISSING = "KL and top-1 agreement were not measured: the engine does not tell likeliest tokens"

Cells = list[tuple[str, str]]  # a number, its bounds or nothing


def heads() -> list[str]:
    """Labels of the columns after HEADS."""
    return ["PPL ratio", *(_label(metric) for metric in DIVERGENCE), "mean Δ p"]


def measured(row: Row) -> bool:
    """Whether the candidate was compared with the base's likeliest tokens."""
    return "kl_mean" in row.candidate.further


def lines(summary: CandidateSummary) -> list[tuple[Row, Cells]]:
    """Every row with its cells, in the order of `heads`; a dash where nothing was measured."""
    return [(row, _cells(summary, row)) for row in summary.rows]


def worst_sentence(rows: Sequence[Row]) -> str:
    """Mean KL and top-1 agreement where the KL is largest; empty where it was not measured."""
    known = [row for row in rows if measured(row)]
    if not known:
        return ""
    row = max(known, key=lambda row: row.candidate["kl_mean"])
    flips = number(100 * (1 - row.candidate["top1_flips"]), 2)
    return (
        f"largest mean KL: {_shown('kl_mean', row.candidate['kl_mean'])} nats on {row.pack} at "
        f"{row.seq_len}, where the likeliest token is the base's at {flips}%"
    )


def _label(metric: Metric) -> str:
    return "same top-1" if metric.name == "top1_flips" else metric.label


def _cells(summary: CandidateSummary, row: Row) -> Cells:
    ratio = row.candidate.ppl / row.base.ppl
    ends = summary.bounds(PPL.relative_change, row)
    cells = [(f"{ratio:.4f}", "" if ends is None else f"{1 + ends[0]:.4f} to {1 + ends[1]:.4f}")]
    for metric in DIVERGENCE:
        if metric.name not in row.candidate.further:
            cells.append(("-", ""))
            continue
        found = [row.candidate[metric.name], *(summary.bounds(metric.change, row) or ())]
        if metric.name == "top1_flips":  # told as agreement, so that more is better
            found = [1 - found[0], *(1 - end for end in reversed(found[1:]))]
        value, *bounds = (_shown(metric.name, one) for one in found)
        cells.append((value, " to ".join(bounds)))
    change = row.candidate.mean_prob - row.base.mean_prob
    within = summary.bounds("dmean_prob", row) or ()
    value, *bounds = (number(100 * one, 3, signed=True) + "%" for one in (change, *within))
    return [*cells, (value, " to ".join(bounds))]


def _shown(name: str, value: float) -> str:
    if name in ("top1_flips", "rms_dp"):
        return f"{100 * value:.3f}%"
    return f"{value:.6f}" if abs(value) < 1 else f"{value:.4f}"
