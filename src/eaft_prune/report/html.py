"""The comparison as one HTML file that opens from disk, without a network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from eaft_prune.core.outcome import Selection
from eaft_prune.core.verdict import Comparison
from eaft_prune.maths.metrics import METRICS, Metric
from eaft_prune.report.elements import text
from eaft_prune.report.evidence_html import (
    coverage_table,
    divergence_table,
    passages_block,
    searchable,
    written_block,
)
from eaft_prune.report.experts import selections_of
from eaft_prune.report.fragments import (
    fact_list,
    glossary,
    headline,
    leaderboard_table,
    metrics_table,
    provenance,
    verdict_block,
)
from eaft_prune.report.gains import Gain, gains_table
from eaft_prune.report.page import Words, page
from eaft_prune.report.plots import plot_data
from eaft_prune.report.summary import CandidateSummary, leaderboard, summarise
from eaft_prune.report.tasks import tasks_table
from eaft_prune.report.text import evidence

_WORDS = Words(
    question="is it near-lossless?",
    skip_to="evidence",
    skipped="the evidence",
    complete="The tables above are complete; the plots need",
)


def html_report(
    comparison: Comparison,
    selection: Selection | Mapping[str, Selection] | None,
    facts: Mapping[str, Any],
    *,
    about: Mapping[str, str] = {},
    gains: Sequence[Gain] = (),
    cc_quantile: float = 0.15,
    metrics: Sequence[Metric] = METRICS,
) -> str:
    """One self-contained page: verdict, tables, (p, H) plots, expert maps, provenance.

    selection: of all candidates, or by candidate label. facts: provenance; values of nested
    mappings are grouped. about: what it opens with. gains: what pruning buys.
    cc_quantile: q of the thresholds p_q and H_q that the plots draw. metrics: those of the gate.
    Equal inputs give equal text. Raises ValueError where the inputs are empty or do not fit
    together.
    """
    summaries = leaderboard(summarise(comparison, metrics))
    selections = selections_of(comparison, selection)
    base = comparison.base.model
    labels = [summary.label for summary in summaries]
    covered = coverage_table(selections)
    passages = [passages_block(comparison, label) for label in labels]
    written = [written_block(summary, comparison) for summary in summaries]
    parts = {
        "about": fact_list(about, "about"),
        "gains": gains_table(gains),
        "headline": headline(summaries, base),
        "leaderboard": leaderboard_table(summaries) if len(summaries) > 1 else "",
        "verdicts": _per_candidate(summaries, base, verdict_block),
        "candidates": "".join(
            f'<option value="{text(label)}">{text(label)}</option>' for label in labels
        ),
        "several": "" if len(summaries) > 1 else "hidden",
        "metrics": _per_candidate(summaries, base, metrics_table),
        "divergence": _per_candidate(summaries, base, divergence_table),
        "tasks": _per_candidate(summaries, base, tasks_table),
        "untasked": "" if comparison.tasks else "hidden",
        "coverage": covered,
        "uncovered": "" if covered else "hidden",
        "find": searchable([*passages, *written]),
        "passages": _beside(labels, passages),
        "written": _beside(labels, written),
        "glossary": glossary(metrics),
        "experts": "" if selections else "hidden",
        "provenance": provenance(facts),
    }
    data = plot_data(comparison, selections, cc_quantile)
    return page("report", _title(summaries, base), _WORDS, data, parts)


def _title(summaries: list[CandidateSummary], base: str) -> str:
    if len(summaries) == 1:
        status = f"{summaries[0].verdict.status} {evidence(summaries[0])}"
        return f"{status}: {summaries[0].label} against {base}"
    return f"{sum(s.passed for s in summaries)} of {len(summaries)} pass against {base}"


def _per_candidate(
    summaries: list[CandidateSummary], base: str, render: Callable[[CandidateSummary, str], str]
) -> str:
    """One block per candidate; the script shows that of the selected one."""
    return _beside([s.label for s in summaries], [render(summary, base) for summary in summaries])


def _beside(labels: Sequence[str], blocks: Sequence[str]) -> str:
    return "".join(
        f'<div data-candidate="{text(label)}">{block}</div>'
        for label, block in zip(labels, blocks, strict=True)
    )
