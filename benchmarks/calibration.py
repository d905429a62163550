"""How often bounds miss the truth, and how often the gate is wrong, by simulation.

    python benchmarks/calibration.py [--draws 400] [--rows 60 150 300 600 1200] [--early-stop]
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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from populations import POPULATIONS, Draw, Drawn, Ints

from eaft_prune.config import EvalSettings, GateSettings
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


def stopped_early(draw: Draw, true: Mapping[str, float], rows: int, draws: int) -> dict[str, float]:
    """Share of draws that pass, at one of five looks, a gate that a check's truth breaks by 2%."""
    rng = np.random.default_rng(rows)
    shares = EvalSettings(
        name="looks", seq_lens=(2,), num_blocks=1, seed=0, early_stop=True
    ).interim_shares
    wrong = dict.fromkeys(true, 0)
    for _ in range(draws):
        some = draw(rows, rng)
        left = set(true)
        for share in shares:
            seen = some.row_T < rows * share
            base, other = (
                TokenScores(s.logp_T[seen], s.entropy_T[seen], s.block_T[seen])
                for s in (some.base, some.other)
            )
            part = Drawn(base, other, some.row_T[seen])
            strict = limited("js2d", 1).over(len(shares))
            found = changes(base, other, part.row_T, QUANTILE, confidence=strict.confidence)
            mine, theirs = ({KEY: report} for report in reports(part))
            for check in sorted(left):
                settings = limited(check, abs(true[check]) * 0.98).over(len(shares))
                verdict = gate(settings, mine, theirs, {} if found is None else {KEY: found})
                outcome = _outcome(verdict, check)
                wrong[check] += outcome == "PASS"
                left -= {check} if outcome != "INCONCLUSIVE" else set()
    return {check: count / draws for check, count in wrong.items()}


def _outcome(verdict: Any, name: str) -> str:
    (found,) = [check.outcome for check in verdict.checks if check.name == name]
    return str(found)


def main(arguments: Sequence[str] | None = None) -> list[Line]:
    """Print a table, a line a population and number of rows; returns one line a check."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=400)
    parser.add_argument("--rows", type=int, nargs="+", default=(60, 150, 300, 600, 1200))
    parser.add_argument("--early-stop", action="store_true", help="looks at 1/16 ... 1 of the rows")
    parser.add_argument("--truth", type=int, default=TRUTH, help="conversations that are the truth")
    parser.add_argument("--populations", nargs="+", default=None)
    parser.add_argument("--evaluations", type=Path, nargs=2, default=None)
    parser.add_argument("--pack", default="UNION")
    parser.add_argument("--seq-len", type=int, default=1024)
    asked = parser.parse_args(arguments)
    names = asked.populations or ([] if asked.evaluations else list(POPULATIONS))
    drawn: dict[str, tuple[Draw, dict[str, float]]] = {
        name: (POPULATIONS[name], truth(POPULATIONS[name](asked.truth, np.random.default_rng(1))))
        for name in names
    }
    if asked.evaluations:
        draw, whole = saved(asked.evaluations[0], asked.evaluations[1], (asked.pack, asked.seq_len))
        true = {name: value for name, value in truth(whole).items() if name != "js2d"}
        drawn["saved evaluations"] = (draw, true)
    said = (
        "false PASS with five looks"
        if asked.early_stop
        else "miss above / below, false PASS / false FAIL, undecided at twice the truth"
    )
    print(f"{said}, in percent")
    print("| population | rows | " + " | ".join(CHECKS) + " |")
    print("| --- | ---: | " + " | ".join("---" for _ in CHECKS) + " |")
    lines: list[Line] = []
    for name, (draw, true) in drawn.items():
        for rows in asked.rows:
            if asked.early_stop:
                shares = stopped_early(draw, true, rows, asked.draws)
                cells = [f"{100 * shares[check]:.1f}" for check in true]
                print(f"| {name} | {rows} | " + " | ".join(cells) + " |", flush=True)
                continue
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
