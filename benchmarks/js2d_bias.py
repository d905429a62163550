"""JS2D of two saved evaluations against the number of tokens: plain, by halves, corrected.

    python benchmarks/js2d_bias.py BASE CANDIDATE [--pack UNION] [--seq-len 1024]
        [--tokens 10000 20000 ...]

BASE and CANDIDATE are directories that task=evaluate saved (`evaluations` in result.json). Blocks
are drawn without replacement; every line is the mean over draws, the error that of one draw.
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
from eaft_prune.maths.intervals import student
from eaft_prune.records.evaluation import load_evaluation

TOKENS = (10_000, 20_000, 50_000, 100_000, 200_000, 500_000, 1_000_000)
DRAWS = 10


def part(scores: TokenScores, chosen: NDArray[Any]) -> TokenScores:
    """The tokens of the chosen blocks."""
    keep = np.isin(scores.block_T, chosen)
    return TokenScores(scores.logp_T[keep], scores.entropy_T[keep], scores.block_T[keep])


def by_halves(base: TokenScores, other: TokenScores) -> float:
    """2 JS(all) - mean of JS(even blocks), JS(odd blocks): exact if the bias were c / T."""
    place = np.unique(base.block_T, return_inverse=True)[1]
    halves = [np.unique(base.block_T[place % 2 == odd]) for odd in (0, 1)]
    mean = np.mean([js2d(part(base, half), part(other, half)) for half in halves])
    return float(2 * js2d(base, other) - mean)


def main(arguments: Sequence[str] | None = None) -> list[list[float]]:
    """Of every line: tokens, plain, by halves, corrected, its error, and the bounds' reach."""
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
    blocks = np.unique(base.block_T)
    rng = np.random.default_rng(0)
    print("| tokens | blocks | draws | plain | by halves | corrected | error | 95% bounds |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |")
    lines: list[list[float]] = []
    for size in sorted({min(size, len(base)) for size in asked.tokens}):
        count = round(len(blocks) * size / len(base))
        rows = []
        for _ in range(1 if count == len(blocks) else DRAWS):
            chosen = rng.choice(blocks, count, replace=False)
            b, o = part(base, chosen), part(other, chosen)
            corrected = js2d_corrected(b, o)
            reach = student(0.95, count) * corrected.error
            rows.append(
                (len(b), js2d(b, o), by_halves(b, o), corrected.value, corrected.error, reach)
            )
        lines.append(np.mean(rows, axis=0).tolist())
        tokens, plain, halves, value, error, reach = lines[-1]
        print(
            f"| {tokens:,.0f} | {count:,} | {len(rows)} | {plain:.4f} | {halves:.4f} "
            f"| {value:.4f} | {error:.4f} | {max(value - reach, 0):.4f} to {value + reach:.4f} |"
        )
    return lines


if __name__ == "__main__":
    main()
