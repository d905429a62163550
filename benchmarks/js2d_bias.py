"""JS2D of two saved evaluations against the number of tokens: plain, by halves, corrected.

    python benchmarks/js2d_bias.py BASE CANDIDATE [--pack UNION] [--seq-len 1024]
        [--tokens 10000 20000 ...]

BASE and CANDIDATE are directories that task=evaluate saved (`evaluations` in result.json). Rows
(conversations) are drawn without replacement; every line is the mean over draws, the error that of
one draw.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eaft_prune.core.types import TokenScores
from eaft_prune.maths.divergence import js2d, js2d_corrected
from eaft_prune.maths.intervals import of_influence
from eaft_prune.records.evaluation import load_evaluation

TOKENS = (10_000, 20_000, 50_000, 100_000, 200_000, 500_000, 1_000_000)
DRAWS = 10


def part(scores: TokenScores, keep_T: NDArray[Any]) -> TokenScores:
    """Some of the tokens."""
    return TokenScores(scores.logp_T[keep_T], scores.entropy_T[keep_T], scores.block_T[keep_T])


def by_halves(base: TokenScores, other: TokenScores, row_T: NDArray[Any]) -> float:
    """2 JS(all) - mean of JS(even rows), JS(odd rows): exact if the bias were c / T."""
    place = np.unique(row_T, return_inverse=True)[1]
    halves = [place % 2 == odd for odd in (0, 1)]
    mean = np.mean([js2d(part(base, half), part(other, half)) for half in halves])
    return float(2 * js2d(base, other) - mean)


def main(arguments: Sequence[str] | None = None) -> list[list[float]]:
    """Of every line: tokens, plain, by halves, corrected, its error, and its bounds."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("candidate", type=Path)
    parser.add_argument("--pack", default="UNION")
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    asked = parser.parse_args(arguments)
    key = (asked.pack, asked.seq_len)
    saved = [load_evaluation(directory) for directory in (asked.base, asked.candidate)]
    if saved[0].token_digests[key] != saved[1].token_digests[key]:
        parser.error("the two were not evaluated on the same tokens")
    base, other = (evaluation.scores[key] for evaluation in saved)
    row_T = saved[0].rows[key]
    ids = np.unique(row_T)
    rng = np.random.default_rng(0)
    print("| tokens | rows | draws | plain | by halves | corrected | error | 95% bounds |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |")
    lines: list[list[float]] = []
    for size in sorted({min(size, len(base)) for size in asked.tokens}):
        count = round(len(ids) * size / len(base))
        drawn = []
        for _ in range(1 if count == len(ids) else DRAWS):
            keep = np.isin(row_T, rng.choice(ids, count, replace=False))
            b, o, rows = part(base, keep), part(other, keep), row_T[keep].astype(np.int64)
            apart = js2d_corrected(b, o, rows)
            halves = by_halves(b, o, rows)
            if apart.influence_n is None:
                drawn.append((len(b), js2d(b, o), halves, apart.value, *[np.nan] * 3))
                continue
            found = of_influence(apart.value, apart.influence_n, 0.95)
            ends = (max(found.low, 0.0), found.high)
            drawn.append((len(b), js2d(b, o), halves, apart.value, found.error, *ends))
        lines.append(np.mean(drawn, axis=0).tolist())
        tokens, plain, halves, value, error, low, high = lines[-1]
        print(
            f"| {tokens:,.0f} | {count:,} | {len(drawn)} | {plain:.4f} | {halves:.4f} "
            f"| {value:.4f} | {error:.4f} | {low:.4f} to {high:.4f} |"
        )
    return lines


if __name__ == "__main__":
    main()
