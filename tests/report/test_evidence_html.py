"""Sections of what was written and read: nothing from a model or a pack is markup."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from support.report_inputs import comparison, selection

from eaft_prune.core.generation import Flips, GenerationReport, Pair, Text
from eaft_prune.core.harness import Scored, TaskReport
from eaft_prune.core.passages import Passage
from eaft_prune.core.types import Coverage
from eaft_prune.core.verdict import Changes, Estimate, GateCheck, GateVerdict
from eaft_prune.report import html_report

EVIL = "</pre><script>alert(1)</script><img src=x onerror=alert(2)>\x1b[2J"


SCORED = Scored(
    0.5, 0.25, Changes(40, {"dtask": Estimate(-0.25, 0.1, -0.4, -0.1),
    "dtask_recovery": Estimate(-0.5, 0.2, -0.8, -0.2)}), Flips(1, 12, 2, 25, 0.0129),
)  # fmt: skip


def page() -> str:
    some = comparison({"pruned": 0.3}, tokens=500)
    rates = dict.fromkeys(("loop_rate", "ended_rate", "well_formed_rate"), 0.25)
    estimate = Estimate(0.125, 0.01, 0.1, 0.15)
    names = (*(f"d{name}" for name in rates), "length_ratio", "agreement")
    good, bad = Text("fine", True, False, True), Text(EVIL, False, True, False)
    written = GenerationReport(
        rates, rates, Changes(40, dict.fromkeys(names, estimate)),
        {name: Flips(1, 2, 3, 4, 0.5) for name in rates}, None, 7.0,
        [Pair(EVIL, "greedy", EVIL, good, bad, 3), Pair("tools", "greedy", "p", good, good, None)],
    )  # fmt: skip
    read = Passage(EVIL, 64, 9.5, (EVIL, "ok"), (0.9, None), (0.1, None))
    answered = {EVIL: TaskReport({EVIL: SCORED}, 1, (EVIL,))}
    checks = [
        GateCheck(name, place, 0, 0.1, 0.01, False, 0.1, -0.2, 0.3, "INCONCLUSIVE", 40, rows)
        for name, place, rows in (("dloop_rate", "generated", 4321), ("dtask_recovery", EVIL, 987))
    ]
    some = replace(
        some,
        beside={"pruned": GateVerdict("v2", "INCONCLUSIVE", tuple(checks), 0.95)},
        generated={"pruned": written},
        passages={"pruned": [read]},
        tasks={"pruned": answered},
    )
    chosen = selection(2, 8, 4, seed=0)
    lost = np.array([[0.25, 0.5], [np.nan, np.nan]])
    covered = Coverage((EVIL, "chinese"), np.array([90, 0]), lost)
    return html_report(some, replace(chosen, coverage=covered), {})


def test_all_of_it_is_escaped() -> None:
    html = page()
    assert "alert(1)&lt;/script&gt;" in html
    assert "<script>alert" not in html
    assert "<img src=x" not in html
    assert "\x1b" not in html


def test_what_it_says() -> None:
    html = page()
    assert "37.5%" in html  # mean of two layers
    assert "no sibling among the profiled text" in html
    assert 'title="p 0.900 → 0.100"' in html
    assert "cut off, loops, malformed" in html
    assert html.count('class="passage"') == 2  # an equal pair is not shown
    assert "40 prompts; 12.5% of the answers are equal" in html
    assert "differ after 7 tokens" in html
    assert 'type="search"' in html
    assert "50.00% <small>20.00% to 80.00%" in html  # half of the base's score is left
    assert "0.0129" in html
    assert '<td class="n">4,321</td>' in html  # prompts that would settle it
    assert '<td class="n">987</td>' in html or "987 <small>" in html


def test_without_generation_it_says_how_to_ask() -> None:
    html = html_report(comparison({"pruned": 0.3}, tokens=500), None, {})
    assert "give eval.generation=true" in html
    assert 'type="search"' not in html
