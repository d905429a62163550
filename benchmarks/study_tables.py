"""The tables of the study, from what `study.py` left.

    python benchmarks/study_tables.py benchmarks/study [--summary docs/results.md]
        [--full benchmarks/README.md]

The summary is against REAP sum, the same criterion without weights of regions: cells are
100 (PPL / PPL of REAP sum's plans - 1), mean and reach of the 95% interval. The full tables are
losses against the whole model, other weights against EAFT-REAP's, and CC rates. **Bold** is less
than what it is against, *italic* more, where the interval excludes 0; losses are marked against
REAP sum.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from methods import interval, written
from study import CONFLICT, UNCERTAIN, UNIFORM

Study = dict[str, Any]

AGAINST = {
    "EAFT-REAP": "EAFT-REAP",
    "REAP mean": "REAP mean",
    "greedy": "greedy",
    "EAFT-REAP, sizes": "EAFT-REAP, sizes by marginal loss",
}

REPAIRED = ("REAP sum, repaired", "greedy, repaired")


def apart(study: Study, method: str, keep_n: int, reference: str | None) -> tuple[float, float]:
    """Mean and reach in nats a token."""
    (found,) = (
        one
        for one in study["apart"]
        if (one["method"], one["keep_n"], one["reference"]) == (method, keep_n, reference)
    )
    return found["mean"], found["reach"]


def percent(mean: float, reach: float) -> str:
    """As a change of PPL; the reach is that of the side farther off."""
    value = 100 * math.expm1(mean)
    return f"{value:+.2f} ± {100 * math.expm1(mean + reach) - value:.2f}"


def marked(text: str, mean: float, reach: float) -> str:
    """Bold where surely less, italic where surely more."""
    if abs(mean) <= reach:
        return text
    return f"**{text}**" if mean < 0 else f"*{text}*"


def against_uniform(study: Study, method: str, keep_n: int) -> str:
    mean, reach = apart(study, method, keep_n, UNIFORM)
    return marked(percent(mean, reach), mean, reach)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def models(studies: Sequence[Study]) -> str:
    """What was pruned."""
    rows = []
    for study in studies:
        shares = [100 * share["conflict"] for share in study["profiled_shares"]]
        base = study["base"]
        rows.append(
            [
                study["model"],
                f"{study['layers']} x {study['experts']}, top-{study['top_k']}",
                f"{base['ppl']:.2f}",
                f"{100 * base['cc_rate']:.3f}%",
                f"{base['mean_p']:.2f}",
                f"{base['mean_h']:.2f}",
                f"{min(shares):.3f} to {max(shares):.3f}%",
            ]
        )
    return table(["model", "experts", "PPL", "CC", "mean p", "mean H", "conflicts profiled"], rows)


def summary(studies: Sequence[Study]) -> str:
    """Every choice that is not a plain sum, against it; what repair leaves of its loss."""
    repaired = [name for name in REPAIRED if any(name in methods_of(one) for one in studies)]
    rows = [
        [study["model"], str(keep_n)]
        + [against_uniform(study, method, keep_n) for method in AGAINST.values()]
        + [left(study, name, keep_n) if name in methods_of(study) else "" for name in repaired]
        for study in studies
        for keep_n in study["keep"]
    ]
    return table(["model", "keep", *AGAINST, *repaired], rows)


def methods_of(study: Study) -> list[str]:
    return list(dict.fromkeys(one["method"] for one in study["plans"]))


def left(study: Study, method: str, keep_n: int) -> str:
    """Share of REAP sum's loss in nats that repaired plans still lose, paired by seed."""
    lost = {
        (one["method"], one["seed"]): one["dnll"]
        for one in study["plans"]
        if one["keep_n"] == keep_n
    }
    shares = [lost[method, seed] / lost[UNIFORM, seed] for seed in study["seeds"]]
    return interval(shares).removeprefix("+")


def weights(studies: Sequence[Study]) -> str:
    """Other weights against EAFT-REAP's own at the middle size, and how many experts they move."""
    rows = []
    names = [f"w_conflict {c:g}, w_uncertain 0.25" for c in CONFLICT]
    names += [f"w_conflict -2, w_uncertain {u:g}" for u in UNCERTAIN]
    names += ["quantile 0.3, w_conflict -2", "quantile 0.5, w_conflict -2"]
    for name in names:
        cells = []
        for study in studies:
            keep_n = study["keep"][len(study["keep"]) // 2]
            mean, reach = apart(study, name, keep_n, "EAFT-REAP")
            moved = [
                one["moved"]
                for one in study["plans"]
                if (one["method"], one["keep_n"]) == (name, keep_n)
            ]
            text = marked(percent(mean, reach), mean, reach)
            cells.append(f"{text} ({statistics.mean(moved):.1f})")
        rows.append([name, *cells])
    heads = [f"{study['model']}, {study['keep'][len(study['keep']) // 2]}" for study in studies]
    return table(["weights", *heads], rows)


def conflicts(studies: Sequence[Study]) -> str:
    """CC rate of the pruned models, in units of 1e-5: differences paired by seed."""
    names = (
        "EAFT-REAP", "w_conflict 0, w_uncertain 0.25", "w_conflict -32, w_uncertain 0.25",
        "REAP mean", "greedy",
    )  # fmt: skip
    rows = []
    for study in studies:
        for keep_n in study["keep"]:
            rate = {
                (one["method"], one["seed"]): 1e5 * one["cc_rate"]
                for one in study["plans"]
                if one["keep_n"] == keep_n
            }
            plain = [rate[UNIFORM, seed] for seed in study["seeds"]]
            base = f"{1e5 * study['base']['cc_rate']:.1f}"
            cells = [base, f"{statistics.mean(plain):.1f}"]
            for name in names:
                pairs = zip(study["seeds"], plain, strict=True)
                cells.append(interval([rate[name, seed] - other for seed, other in pairs]))
            rows.append([study["model"], str(keep_n), *cells])
    return table(["model", "keep", "whole", UNIFORM, *names], rows)


def full(study: Study) -> str:
    """All methods of one model against the whole one."""
    rows = []
    for method in methods_of(study):
        if method.startswith(("w_", "quantile")):
            continue
        cells = []
        for keep_n in study["keep"]:
            text = percent(*apart(study, method, keep_n, None))
            if method != UNIFORM:
                text = marked(text, *apart(study, method, keep_n, UNIFORM))
            cells.append(text)
        rows.append([method, *cells])
    return table([study["model"], *(f"keep {keep_n}" for keep_n in study["keep"])], rows)


def main(arguments: Sequence[str] | None = None) -> str:
    """Print and put the tables."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--summary", type=Path)
    parser.add_argument("--full", type=Path)
    asked = parser.parse_args(arguments)
    studies = [json.loads(file.read_text()) for file in sorted(asked.folder.glob("*.json"))]
    short = "\n\n".join([models(studies), summary(studies)])
    long = "\n\n".join([*map(full, studies), weights(studies), conflicts(studies)])
    for path, text in ((asked.summary, short), (asked.full, long)):
        if path:
            written(path, text, "study")
    print(text := f"{short}\n\n{long}")
    return text


if __name__ == "__main__":
    main()
