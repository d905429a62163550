"""The decision memo: which keep_n passes, on what evidence, and what fails first."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from itertools import groupby
from typing import Any

from eaft_prune.core.outcome import RunSummary
from eaft_prune.report.evidence import Run
from eaft_prune.report.markdown import code, inline, table

FILE = "memo.md"
_MEMORY = "telemetry/memory/peak_"


def decision_memo(
    kept: Sequence[RunSummary],
    sources: Mapping[str, str],
    pruning_tasks: Collection[str],
    controls: Collection[str],
) -> str:
    """Markdown, per base model: recommendation, verdicts per criterion, first failures, costs.

    A keep_n passes if every run of it passes, fails if one fails, and is undecided otherwise; the
    recommendation is the smallest that passes. sources: where the runs were read. The verdicts of
    pruning_tasks are on a pruned model, those of controls on the measurement itself.
    """
    runs = [Run(one) for one in kept]
    judged = [run for run in runs if run.task in pruning_tasks and run.status and run.checks()]
    lines = ["# Decision memo", "", *(f"- {key}: {code(value)}" for key, value in sources.items())]
    verdicts = f"{len(judged)} of them with a verdict on pruning"
    if (results := len(_distinct(judged))) < len(judged):
        verdicts += f", which are {results} distinct results"
    lines += [f"- {len(runs)} finished runs, {verdicts}", ""]
    if not judged:
        lines += [
            "No finished run has a verdict on a pruned model: there is nothing to decide.",
            "",
        ]
    for (name, digest), group in _grouped(judged, lambda run: run.model):
        lines += _model(name, digest, group)
    lines += _controls([run for run in runs if run.task in controls and run.status])
    lines += _costs(runs)
    return "\n".join(lines).rstrip() + "\n"


def recommended(kept: Sequence[RunSummary], pruning_tasks: Collection[str]) -> list[str]:
    """The memo's recommendation for each base model, a line each, for a terminal."""
    runs = [Run(one) for one in kept]
    judged = [run for run in runs if run.task in pruning_tasks and run.status and run.checks()]
    lines = []
    for (name, digest), group in _grouped(judged, lambda run: run.model):
        best = recommendation(group)
        what = "none: no keep_n passes in every run of one method"
        if best is not None:
            keep_n, passing = best
            labels = _labels([method for method, _ in _grouped(group, lambda run: run.method)])
            how = f"{labels[passing[0].method]}, {_count(passing)}, all PASS"
            what = f"keep_n = {keep_n} with {how}"
        lines.append(f"{name} {digest[:8]}: {what}")
    return lines or ["no finished run has a verdict on a pruned model: there is nothing to decide"]


def recommendation(runs: Sequence[Run]) -> tuple[int, list[Run]] | None:
    """Smallest keep_n of any method whose every run passes, with those runs, or None."""
    passing = [
        (keep_n, -len(_distinct(group)), method, group)
        for (method, keep_n), group in _grouped(runs, lambda run: (run.method, run.keep_n))
        if verdict(group) == "PASS"
    ]
    if not passing:
        return None
    keep_n, _, _, group = min(passing, key=lambda item: item[:3])
    return keep_n, group


def verdict(runs: Iterable[Run]) -> str:
    """FAIL if one run fails, PASS if all pass, else INCONCLUSIVE."""
    statuses = {run.status for run in runs}
    if "FAIL" in statuses:
        return "FAIL"
    return "PASS" if statuses == {"PASS"} else "INCONCLUSIVE"


def _model(name: str, digest: str, runs: Sequence[Run]) -> list[str]:
    lines = [f"## {inline(name)}", "", f"Base {code(digest[:16])}.", ""]
    methods = _grouped(runs, lambda run: run.method)
    labels = _labels([method for method, _ in methods])
    best = recommendation(runs)
    if best is None:
        lines += ["**Recommendation: none.** No keep_n passes in every run of one method.", ""]
    else:
        keep_n, group = best
        tested = "; ".join(f"{seeds} at {lengths}" for lengths, seeds in _tested(group))
        lines += [
            f"**Recommendation: keep_n = {keep_n}** with {inline(labels[group[0].method])}: "
            f"{_count(group)}, all PASS ({inline(tested)}).",
            "",
        ]
        smaller = [run for run in group if run.candidate == "masked"]
        if smaller:
            lines += ["Judged masked in the base model; export it and judge the checkpoint.", ""]
    rows, failures = [], []
    for method, of_method in methods:
        for keep_n, group in _grouped(of_method, lambda run: run.keep_n, reverse=True):
            tested = "; ".join(f"{lengths}: {seeds}" for lengths, seeds in _tested(group))
            tightest = max((run.checks()[0] for run in group), key=lambda check: check.usage)
            packs = [pack for run in group if (pack := run.worst_pack())]
            pack = max(packs, key=lambda item: item[1], default=None)
            rows.append(
                (
                    inline(labels[method]),
                    str(keep_n),
                    f"**{verdict(group)}**",
                    _count(group),
                    inline(tested),
                    inline(str(tightest)),
                    f"{inline(pack[0])} {100 * pack[1]:+.1f}%" if pack else "",
                )
            )
        failures += _first_failure(labels[method], of_method)
    head = ("method", "keep_n", "verdict", "runs", "tested", "tightest check", "worst pack, PPL")
    lines += table(head, rows, left=7)
    if failures:
        lines += ["### What fails first", "", *failures, ""]
    return lines


def _first_failure(label: str, runs: Sequence[Run]) -> list[str]:
    """Of the largest keep_n with a failing run: its checks beyond their limits, worst first."""
    failing = [run for run in runs if run.status == "FAIL"]
    if not failing:
        return []
    keep_n = max(run.keep_n for run in failing)
    lines = [f"- {inline(label)}, keep_n = {keep_n}:"]
    for of_result in _distinct([run for run in failing if run.keep_n == keep_n]):
        run = of_result[0]
        over = [check for check in run.checks() if check.usage > 1]
        again = "" if len(of_result) == 1 else f", {len(of_result)} runs"
        what = "; ".join(map(str, over)) or run.kept.tags.get("gate.failed_checks", "?")
        where = f"seed {run.evidence[2]} ({inline(run.evidence[3])})"
        lines.append(f"  - {where}{again}: {inline(what)}")
    passing = [run.keep_n for run in runs if run.status == "PASS" and run.keep_n < keep_n]
    if passing:
        lines.append(f"  - yet keep_n = {min(passing)} has runs that pass")
    return lines


def _controls(runs: Sequence[Run]) -> list[str]:
    rows = [
        (
            inline(run.task),
            inline(run.model[0]),
            f"**{run.status}**",
            inline(str(checks[0])) if (checks := run.checks()) else "",
        )
        for run in runs
    ]
    if not rows:
        return []
    head = ("control", "model", "verdict", "tightest check")
    return ["## Controls", "", *table(head, rows, left=4)]


def _costs(runs: Sequence[Run]) -> list[str]:
    rows = []
    for run in runs:
        rates = [run.rate(stage) for stage in ("profile", "evaluate")]
        memory = [run.kept.metrics.get(f"{_MEMORY}{kind}_bytes") for kind in ("rss", "cuda")]
        if any(value is not None for value in (*rates, *memory)):
            rows.append(
                (
                    inline(run.kept.name),
                    code(run.kept.run_id[:8]),
                    _day(run.kept.ended),
                    *("" if rate is None else f"{rate:,.0f}" for rate in rates),
                    *("" if size is None else f"{size / 1e9:.2f}" for size in memory),
                )
            )
    head = (
        "run",
        "id",
        "ended (UTC)",
        "profile tokens/s",
        "evaluate tokens/s",
        "RSS GB",
        "CUDA GB",
    )
    if not rows:
        return []
    note = "Rates are those of the run that computed the stage; memory is the process's peak."
    return ["## Throughput and memory", "", note, "", *table(head, rows, left=3)]


def _tested(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Regime and lengths -> the evaluation seeds they were tested on."""
    found: dict[str, list[str]] = {}
    for run in runs:
        _, lengths, seed, name = run.evidence
        found.setdefault(f"{name} {lengths}", []).append(seed)
    return [
        (where, f"seed {', '.join(sorted(set(seeds)))}") for where, seeds in sorted(found.items())
    ]


def _labels(
    methods: Sequence[tuple[tuple[str, str], ...]],
) -> dict[tuple[tuple[str, str], ...], str]:
    """Criterion names, with the settings in which methods of one criterion differ."""
    labels = {}
    for method in methods:
        name = dict(method).get("pruning.name", "?")
        rivals = [dict(other) for other in methods if dict(other).get("pruning.name") == name]
        own = [
            f"{key.removeprefix('pruning.')}={value}"
            for key, value in method
            if any(rival.get(key) != value for rival in rivals)
        ]
        labels[method] = " ".join([name, *own])
    return labels


def _day(seconds: float | None) -> str:
    return "" if seconds is None else f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M}"


def _grouped(runs: Iterable[Run], key: Callable[[Run], Any], reverse: bool = False) -> list[Any]:
    """Keys in order, each with its runs in theirs."""
    ordered = sorted(runs, key=key, reverse=reverse)
    return [(value, list(group)) for value, group in groupby(ordered, key=key)]


def _distinct(runs: Iterable[Run]) -> list[list[Run]]:
    """Runs by what they found: a run that was repeated from the store is no further evidence."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(repr(run.result), []).append(run)
    return list(found.values())


def _count(runs: Sequence[Run]) -> str:
    """How many results, and how many runs where those are more."""
    results, ran = len(_distinct(runs)), len(runs)
    if results == ran:
        return "1 run" if ran == 1 else f"{ran} runs"
    return f"{results} result{'s' * (results > 1)}, {ran} runs"
