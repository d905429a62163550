"""The decode benchmark as a terminal table and as a page with plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from eaft_prune.report.terminal import listing
from eaft_prune.report.text import number

Rows = Sequence[Mapping[str, Any]]
_HEADS = ("side", "new", "batch", "tok/s", "tok/s a stream", "first token s", "x base")
_PLOTS = {
    "total_tokens_s": "new tokens/s, all streams",
    "stream_tokens_s": "new tokens/s, one stream",
    "ttft_s": "seconds to the first token",
}


def decode_table(rows: Rows) -> str:
    """One row a side, length and batch."""
    cells = [
        [
            row["side"],
            str(row["new_tokens"]),
            str(row["batch"]),
            number(row["total_tokens_s"], 1),
            number(row["stream_tokens_s"], 1),
            number(row["ttft_s"], 4),
            "" if row["ratio"] is None else number(row["ratio"], 3),
        ]
        for row in rows
    ]
    return listing(_HEADS, cells)


def decode_page(rows: Rows) -> str:
    """A self-contained HTML page: each rate over the batch size, a line a side and length."""
    from plotly import graph_objects
    from plotly.subplots import make_subplots

    figure = make_subplots(rows=1, cols=len(_PLOTS), subplot_titles=list(_PLOTS.values()))
    lines = list(dict.fromkeys((row["side"], row["new_tokens"]) for row in rows))
    for column, field in enumerate(_PLOTS, start=1):
        for side, new_tokens in lines:
            mine = [r for r in rows if (r["side"], r["new_tokens"]) == (side, new_tokens)]
            trace = graph_objects.Scatter(
                x=[row["batch"] for row in mine],
                y=[row[field] for row in mine],
                name=f"{side}, {new_tokens} new",
                legendgroup=f"{side} {new_tokens}",
                showlegend=column == 1,
                mode="lines+markers",
                line={"dash": "solid" if side == "base" else "dash"},
            )
            figure.add_trace(trace, row=1, col=column)
        figure.update_xaxes(title="batch", type="log", row=1, col=column)
        figure.update_yaxes(rangemode="tozero", row=1, col=column)
    figure.update_layout(title="Decode benchmark", template="plotly_white")
    page: str = figure.to_html(include_plotlyjs=True, full_html=True)
    return page
