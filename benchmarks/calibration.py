"""How often bounds miss the truth, and how often the gate is wrong, by simulation.

    python benchmarks/calibration.py [--draws 400] [--rows 60 150 300 600 1200]
        [--evaluations BASE CANDIDATE [--pack UNION] [--seq-len 1024]] [--populations NAME ...]

A population gives conversations with the token scores of two models. A draw of n of them asks for
changes and verdicts as a run does. `miss` is the share of draws whose upper (lower) bound is below
(above) the truth: 5% is what 95% promises. `false PASS` is the share that passes a gate whose one
limit the truth breaks by 2%, `false FAIL` the share that fails one whose limit the truth holds by
2%. Truth is that of 50,000 conversations more. With --evaluations conversations are those of two
saved evaluations of real models, drawn with replacement, and truth is that of all of them; not for
JS2D, which of finitely many conversations is not smooth: its bins hold one token or none.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eaft_prune.config import GateSettings
from eaft_prune.core.types import TokenScores
from eaft_prune.core.verdict import PackReport
from eaft_prune.maths.intervals import changes
from eaft_prune.maths.metrics import pack_report
from eaft_prune.records.evaluation import load_evaluation
from eaft_prune.stages.gate import gate

CHECKS = ("dppl_relative", "dcc_rate", "dmean_prob", "js2d")
LIMITS = {
    "dppl_relative": "max_dppl_relative",
    "dcc_rate": "max_dcc_rate",
    "dmean_prob": "max_dmean_prob",
    "js2d": "max_js2d",
}
QUANTILE = 0.15
CONFIDENCE = 0.95
KEY = ("UNION", 1024)
TRUTH = 50_000  # conversations
Values = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Drawn:
    """Conversations one after another, and two models' scores of their tokens."""

    base: TokenScores
    other: TokenScores
    row_T: Ints  # ascending


Draw = Callable[[int, np.random.Generator], Drawn]  # so many conversations


def tokens(loss_n: Values, lengths_n: Ints, rng: np.random.Generator, **how: Any) -> Drawn:
    """Conversations whose candidate loses loss_n nats a token on average.

    conflicts_n: the share of a conversation's tokens that the candidate is sure and wrong about.
    copies: how often each is there.
    """
    row = np.repeat(np.arange(len(lengths_n)), lengths_n)
    n = len(row)
    logit = rng.normal(0.8, 0.5, len(lengths_n))[row] + rng.normal(0, 1.5, n)
    logp = -np.log1p(np.exp(-logit))
    entropy = np.clip(0.75 * (1 - np.exp(logp)) + 0.1 * rng.random(n), 0, 1)
    later = logp - loss_n[row] * rng.gamma(4, 0.25, n)
    later_entropy = np.clip(0.75 * (1 - np.exp(later)) + 0.1 * rng.random(n), 0, 1)
    if (conflicts_n := how.get("conflicts_n")) is not None:
        wrong = rng.random(n) < conflicts_n[row]
        later = np.where(wrong, -4 - rng.random(n), later)
        later_entropy = np.where(wrong, 0.01 * rng.random(n), later_entropy)
    index = np.tile(np.arange(n), how.get("copies", 1))
    block = np.zeros(len(index), np.int32)
    base, other = (
        TokenScores(lp[index].astype(np.float32), h[index].astype(np.float32), block)
        for lp, h in ((logp, entropy), (later, later_entropy))
    )
    return Drawn(base, other, row[index])


def lengths(rows: int, rng: np.random.Generator, spread: float = 0.6) -> Ints:
    """Tokens a conversation, log-normal about 55."""
    return np.clip(np.exp(rng.normal(4.0, spread, rows)), 4, 4000).astype(np.int64)


def lognormal(sigma: float, spread: float = 0.6, copies: int = 1) -> Draw:
    def draw(rows: int, rng: np.random.Generator) -> Drawn:
        loss = 0.04 * np.exp(rng.normal(0, sigma, rows) - sigma**2 / 2)
        return tokens(loss, lengths(rows, rng, spread), rng, copies=copies)

    return draw


def rare(share: float, nats: float) -> Draw:
    def draw(rows: int, rng: np.random.Generator) -> Drawn:
        loss = np.where(rng.random(rows) < share, nats, 0.005)
        return tokens(loss, lengths(rows, rng), rng)

    return draw


def bursts(share: float, of_row: float) -> Draw:
    def draw(rows: int, rng: np.random.Generator) -> Drawn:
        hit = np.where(rng.random(rows) < share, of_row, 0.0)
        return tokens(np.full(rows, 0.005), lengths(rows, rng), rng, conflicts_n=hit)

    return draw


def longer(rows: int, rng: np.random.Generator) -> Drawn:
    long = lengths(rows, rng)
    return tokens(0.04 * long / 65 * rng.gamma(1, 1, rows), long, rng)


def pareto(rows: int, rng: np.random.Generator) -> Drawn:
    return tokens(0.06 * rng.pareto(2.5, rows), lengths(rows, rng), rng)


POPULATIONS: Mapping[str, Draw] = {
    "even": lognormal(0.3),
    "skewed": lognormal(1.0),
    "heavy": lognormal(1.5),
    "heavy, so are lengths": lognormal(1.5, 1.0),
    "pareto": pareto,
    "grows with length": longer,
    "six copies of each": lognormal(1.0, copies=6),
    "1% lose 6 nats": rare(0.01, 6),
    "2% lose 3 nats": rare(0.02, 3),
    "3% lose 2 nats": rare(0.03, 2),
    "conflicts in 1%": bursts(0.01, 0.3),
    "conflicts in 3%": bursts(0.03, 0.1),
}


def saved(base: Path, candidate: Path, key: tuple[str, int]) -> tuple[Draw, Drawn]:
    """Draws from the conversations of two saved evaluations, and all of them."""
    mine, theirs = load_evaluation(base), load_evaluation(candidate)
    if mine.token_digests[key] != theirs.token_digests[key]:
        raise SystemExit("the two were not evaluated on the same tokens")
    row = np.unique(mine.rows[key], return_inverse=True)[1]
    order = np.argsort(row, kind="stable")
    row = row[order]
    starts = np.searchsorted(row, np.arange(int(row[-1]) + 2))

    def part(index: Ints, unit: Ints) -> Drawn:
        block = np.zeros(len(index), np.int32)
        sides = [
            TokenScores(s.logp_T[order][index], s.entropy_T[order][index], block)
            for s in (mine.scores[key], theirs.scores[key])
        ]
        return Drawn(sides[0], sides[1], unit)

    def draw(rows: int, rng: np.random.Generator) -> Drawn:
        chosen = rng.integers(0, len(starts) - 1, rows)
        sizes = starts[chosen + 1] - starts[chosen]
        place = np.repeat(starts[chosen] - np.cumsum(sizes) + sizes, sizes)
        return part(place + np.arange(int(sizes.sum())), np.repeat(np.arange(rows), sizes))

    return draw, part(np.arange(len(row)), row)


def reports(some: Drawn) -> tuple[PackReport, PackReport]:
    block = np.zeros(len(some.base), np.int32)
    base, other = (TokenScores(s.logp_T, s.entropy_T, block) for s in (some.base, some.other))
    return (
        pack_report(base, base, QUANTILE, row_T=some.row_T),
        pack_report(other, base, QUANTILE, row_T=some.row_T),
    )


def truth(whole: Drawn) -> dict[str, float]:
    base, other = reports(whole)
    return {
        "dppl_relative": other.ppl / base.ppl - 1,
        "dcc_rate": other.cc_rate - base.cc_rate,
        "dmean_prob": other.mean_prob - base.mean_prob,
        "js2d": other.js2d_corrected,
    }


def limited(check: str, limit: float) -> GateSettings:
    """A gate on one check alone, at this limit."""
    wide = dict.fromkeys(["max_dppl", *LIMITS.values()], 1e9)
    asked = {**wide, LIMITS[check]: limit, "name": check, "seq_lens": (KEY[1],)}
    return GateSettings.model_validate({**asked, "confidence": CONFIDENCE})


@dataclass(frozen=True)
class Line:
    """What the draws of one population and number of rows found of one check, as shares."""

    population: str
    rows: int
    check: str
    above: float  # upper bound below the truth
    below: float
    false_pass: float
    false_fail: float
    undecided: float  # of a gate whose limit is twice the truth


def calibrate(
    name: str, draw: Draw, true: Mapping[str, float], rows: int, draws: int
) -> Iterator[Line]:
    rng = np.random.default_rng(rows)
    counts = {check: np.zeros(5) for check in true}
    for _ in range(draws):
        some = draw(rows, rng)
        found = changes(some.base, some.other, some.row_T, QUANTILE, confidence=CONFIDENCE)
        base, other = ({KEY: report} for report in reports(some))
        for check, value in true.items():
            estimate = None if found is None else found.get(check)
            broken, held, wide = (
                gate(
                    limited(check, abs(value) * x),
                    base,
                    other,
                    {} if found is None else {KEY: found},
                )
                for x in (0.98, 1.02, 2)
            )
            counts[check] += (
                estimate is not None and estimate.high < value,
                estimate is not None and estimate.low > value,
                _outcome(broken, check) == "PASS",
                _outcome(held, check) == "FAIL",
                _outcome(wide, check) == "INCONCLUSIVE",
            )
    for check in true:
        yield Line(name, rows, check, *(counts[check] / draws).tolist())


def _outcome(verdict: Any, name: str) -> str:
    (found,) = [check.outcome for check in verdict.checks if check.name == name]
    return str(found)


def main(arguments: Sequence[str] | None = None) -> list[Line]:
    """Print a table, a line a population and number of rows; returns one line a check."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=400)
    parser.add_argument("--rows", type=int, nargs="+", default=(60, 150, 300, 600, 1200))
    parser.add_argument("--populations", nargs="+", default=None)
    parser.add_argument("--evaluations", type=Path, nargs=2, default=None)
    parser.add_argument("--pack", default="UNION")
    parser.add_argument("--seq-len", type=int, default=1024)
    asked = parser.parse_args(arguments)
    names = asked.populations or ([] if asked.evaluations else list(POPULATIONS))
    drawn: dict[str, tuple[Draw, dict[str, float]]] = {
        name: (POPULATIONS[name], truth(POPULATIONS[name](TRUTH, np.random.default_rng(1))))
        for name in names
    }
    if asked.evaluations:
        draw, whole = saved(asked.evaluations[0], asked.evaluations[1], (asked.pack, asked.seq_len))
        true = {name: value for name, value in truth(whole).items() if name != "js2d"}
        drawn["saved evaluations"] = (draw, true)
    print("miss above / below, false PASS / false FAIL, undecided at twice the truth, in percent")
    print("| population | rows | " + " | ".join(CHECKS) + " |")
    print("| --- | ---: | " + " | ".join("---" for _ in CHECKS) + " |")
    lines: list[Line] = []
    for name, (draw, true) in drawn.items():
        for rows in asked.rows:
            found = list(calibrate(name, draw, true, rows, asked.draws))
            lines += found
            cells = [
                f"{100 * x.above:.1f} / {100 * x.below:.1f}, {100 * x.false_pass:.1f} / "
                f"{100 * x.false_fail:.1f}, {100 * x.undecided:.0f}"
                for x in found
            ]
            print(f"| {name} | {rows} | " + " | ".join(cells) + " |", flush=True)
    return lines


if __name__ == "__main__":
    main()
