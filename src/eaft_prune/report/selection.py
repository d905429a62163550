"""A plan and the scores it was cut from, a line a layer, for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from eaft_prune.core.outcome import Selection
from eaft_prune.report.terminal import listing

_WIDTH = 40  # columns that kept ids may take


def selection_table(selection: Selection) -> str:
    """Per layer the experts kept, the range of scores, and the margin at the cut.

    The margin is the lowest score kept less the highest dropped: below 0 where an expert of the
    core stays in place of one with a higher score.
    """
    rows = []
    for layer, kept in enumerate(selection.plan.kept):
        scores_E = selection.scores.score_LE[layer]
        dropped = np.setdiff1d(np.arange(len(scores_E)), kept)
        margin = (
            f"{scores_E[list(kept)].min() - scores_E[dropped].max():.4g}" if len(dropped) else ""
        )
        low, high = (f"{end:.4g}" for end in (scores_E.min(), scores_E.max()))
        rows.append((str(layer), str(len(kept)), low, high, margin, abbreviated(kept)))
    heads = ("layer", "keeps", "lowest score", "highest", "margin at the cut", "experts kept")
    table = listing(heads, rows, right=heads[1:-1])
    return f"{selection.criterion}, plan {selection.plan.digest[:8]}\n\n{table}"


def abbreviated(ids: Sequence[int], width: int = _WIDTH) -> str:
    """Ascending ids with runs of them as `4-7`; what does not fit ends in an ellipsis."""
    runs: list[list[int]] = []
    for i in ids:
        if runs and runs[-1][-1] == i - 1:
            runs[-1][1:] = [i]
        else:
            runs.append([i])
    text = ",".join("-".join(map(str, run)) for run in runs)
    if len(text) <= width:
        return text
    return text[: text.rindex(",", 0, width - 1) + 1] + "…"
