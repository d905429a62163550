"""Reports say what the Comparison says, reach no network and run no foreign script."""

from __future__ import annotations

import base64
import html
import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.report_inputs import FACTS, PACKS, SEQ_LENS, comparison, selection

from eaft_prune.core.outcome import Selection
from eaft_prune.core.text import id_ranges
from eaft_prune.core.types import ExpertScores, KeepPlan
from eaft_prune.core.verdict import Comparison, GateVerdict
from eaft_prune.report import comparison_table, facts_text, html_report, markdown_report
from eaft_prune.report.experts import expert_map
from eaft_prune.report.text import number

NASTY = "</script><script>alert(1)</script>|`x`\"'&<b>\x1b[31m"
FIELDS = {"ppl": 3, "cc_rate": 4, "mean_prob": 4, "mean_entropy": 4}


@pytest.fixture(scope="module")
def pair() -> Comparison:
    return comparison({"keep24": 0.6})


@pytest.fixture(scope="module")
def page(pair: Comparison) -> str:
    return html_report(pair, selection(), FACTS)


class Elements(HTMLParser):
    """Every start tag with its attributes, and the text outside scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.scripts: list[str] = []
        self._inside: str | None = None
        self._in_cell = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self._in_cell = True
        elif tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = None
        if tag in ("td", "th"):
            self._in_cell = False

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._in_cell:
            self.rows[-1][-1] += data


def embedded(page: str) -> Any:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert found
    return json.loads(found[1])


def unpacked(packed: dict[str, Any]) -> np.ndarray[Any, Any]:
    return np.frombuffer(base64.b64decode(packed["data"]), dtype=f"<u{packed['bits'] // 8}")


def oracle_number(value: float, decimals: int, *, signed: bool = False) -> str:
    rounded = round(value, decimals)
    return f"{0:.{decimals}f}" if rounded == 0 else f"{rounded:{'+' if signed else ''}.{decimals}f}"


def expected_metrics(pair: Comparison, pack: str, seq_len: int) -> list[tuple[str, str, str]]:
    """(base, candidate, candidate - base) as text, straight from the reports."""
    base = pair.reports["base"][pack, seq_len]
    candidate = pair.reports["keep24"][pack, seq_len]
    found = []
    for field, decimals in FIELDS.items():
        b, c = getattr(base, field), getattr(candidate, field)
        found.append(
            (
                oracle_number(b, decimals),
                oracle_number(c, decimals),
                oracle_number(c - b, decimals, signed=True),
            )
        )
    return found


def expected_bounds(pair: Comparison, pack: str, seq_len: int) -> list[tuple[str, str]]:
    """Lower and upper bound of every change as text: the gate's where it read the change."""
    where = (pack, seq_len)
    judged = {c.name: c for c in pair.verdicts["keep24"].checks if (c.pack, c.seq_len) == where}
    found = []
    for field, decimals in FIELDS.items():
        known = judged.get(f"d{field}") or pair.changes["keep24"][where][f"d{field}"]
        low, high = (oracle_number(end, decimals, signed=True) for end in (known.low, known.high))
        found.append((low, high))
    return found


def test_terminal_table_holds_the_numbers_of_the_comparison(pair: Comparison) -> None:
    lines = [line.split() for line in comparison_table(pair, width=110, color=False).splitlines()]
    for pack in PACKS:
        for seq_len in SEQ_LENS:
            at = next(i for i, line in enumerate(lines) if line[:2] == [pack, str(seq_len)])
            base, candidate, delta, least, most = lines[at : at + 5]
            assert least[:2] + most[:2] == ["at", "least", "at", "most"]
            ends = list(zip(least[2:6], most[2:6], strict=True))
            assert ends == expected_bounds(pair, pack, seq_len)
            metrics = expected_metrics(pair, pack, seq_len)
            assert base[3:7] == [m[0] for m in metrics]
            assert candidate[1:5] == [m[1] for m in metrics]
            assert delta[1:5] == [m[2] for m in metrics]
            report = pair.reports["keep24"][pack, seq_len]
            assert candidate[5:] == [oracle_number(report.js2d_corrected, 4), f"{report.js2d:.4f}"]
            assert base[7] == f"{report.scored_tokens:,}"


def test_html_and_markdown_hold_the_numbers_of_the_comparison(pair: Comparison, page: str) -> None:
    rows = [
        [cell.strip().replace("\u2212", "-").replace("\xa0", " ") for cell in row]
        for row in Elements(page).rows
    ]
    lines = markdown_report(pair, None, {}).replace("*", "").replace("\\", "").splitlines()
    for pack in PACKS:
        for seq_len in SEQ_LENS:
            metrics = expected_metrics(pair, pack, seq_len)
            row = next(row for row in rows if row[:2] == [pack, str(seq_len)])
            ends = [" to ".join(pair) for pair in expected_bounds(pair, pack, seq_len)]
            both = list(zip(metrics, ends, strict=True))
            assert row[2:14] == [n for (b, c, d), e in both for n in (b, c, f"{d} {e}")]
            cells = [cell for (b, c, d), e in both for cell in (f"{b} → {c}", f"{d} ({e})")]
            assert any(
                line.startswith(f"| {pack} | {seq_len} | {' | '.join(cells)} |") for line in lines
            )


def test_reading_order_is_union_first_then_packs_as_given(pair: Comparison) -> None:
    views = embedded(html_report(pair, None, {}))["views"]
    assert [(v["pack"], v["seqLen"]) for v in views] == [
        (pack, seq_len) for pack in ("UNION", *PACKS[:-1]) for seq_len in SEQ_LENS
    ]


def test_every_failing_check_is_in_every_verdict(pair: Comparison, page: str) -> None:
    verdict = pair.verdicts["keep24"]
    assert verdict.failed_checks, "the input should fail somewhere"
    last = comparison_table(pair, width=100, color=False).strip().splitlines()[-1]
    twin = markdown_report(pair, None, {}).replace("\\", "")
    assert last.startswith("FAIL ")
    assert twin.startswith("## FAIL on 3,000 tokens of 10 conversations: keep24 against base\n")
    for label in verdict.failed_checks:
        assert label in last
        assert label in twin
    failing_rows = [row for row in Elements(page).rows if row and row[-1].strip() == "FAIL"]
    assert len(failing_rows) == len(verdict.failed_checks)
    assert comparison_table(pair, color=False).count(" FAIL\n") == len(verdict.failed_checks)


def test_an_inconclusive_verdict_says_what_is_open_and_what_would_settle_it() -> None:
    unsure = comparison({"keep28": 0.3})
    verdict = unsure.verdicts["keep28"]
    assert (verdict.status, verdict.plain) == ("INCONCLUSIVE", "FAIL")
    assert verdict.settled_by is not None
    settled = f"about {verdict.settled_by.settled_at:,} conversations would settle"
    page = html_report(unsure, None, {})
    table = comparison_table(unsure, width=100, color=False)
    twin = markdown_report(unsure, None, {}).replace("\\", "")
    last = table.strip().splitlines()[-1]
    rests = "INCONCLUSIVE on 3,000 tokens of 10 conversations: "
    assert last.startswith(rests)
    assert twin.startswith(f"## {rests}keep28 against base\n")
    for report in (last, twin):
        for label in (*verdict.undecided_checks, *verdict.plain_failed_checks):
            assert label in report
        assert f"{settled} {verdict.settled_by.label}" in report
        assert "95% confidence; by point estimates FAIL" in report
    assert settled[1:] in page  # begins a sentence there
    undecided = [row for row in Elements(page).rows if row and row[-1].strip() == "INCONCLUSIVE"]
    assert len(undecided) == len(verdict.undecided_checks) == table.count(" undecided\n")
    for check in verdict.checks:
        assert check.low is not None
        assert check.high is not None
        sign = check.name != "js2d"
        ends = [oracle_number(end, 4, signed=sign) for end in (check.low, check.high)]
        if check.name == "dppl_relative":  # a share
            ends = [f"{100 * end:+.2f}%" for end in (check.low, check.high)]
            row = [f"{100 * check.value:+.2f}%", *" to ".join(ends).split(), "5.00%"]
            assert row in [line.split()[-7:-2] for line in table.splitlines()]
        bounds = " to ".join(ends)
        assert bounds in table
        assert f"| {bounds} |" in twin
        assert bounds.replace("-", "\u2212") in page


def few_tokens() -> Comparison:
    """A PASS on few tokens: the plain JS2D is five times its limit, and mostly bias."""
    pair = comparison({"keep24": 0.05}, packs=("UNION",), seq_lens=(64,), tokens=2_594)
    checks = tuple(
        replace(
            check, value=0.1003, passed=False, estimate=0.0017, low=0.0, high=0.0123,
            limit=0.02, decided="PASS",
        )
        if check.name == "js2d"
        else replace(check, limit=1.0, passed=True, decided="PASS")
        for check in pair.verdicts["keep24"].checks
    )  # fmt: skip
    return replace(pair, verdicts={"keep24": GateVerdict("g", "PASS", checks, 0.95)})


def test_a_check_shows_the_number_that_decides_it_and_the_plain_one_beside_it() -> None:
    pair = few_tokens()
    note = "plain 0.1003, biased upward with 2,594 tokens"
    numbers = ["0.0017", "0.0000", "to", "0.0123", "0.0200", "+0.0183", "pass"]
    table = comparison_table(pair, width=100, color=False).splitlines()
    (row,) = [line.split() for line in table if line.split()[:2] == ["JS2D", "UNION"]]
    assert row[-7:] == numbers
    assert f"JS2D on UNION at 64: {note}" in table
    twin = markdown_report(pair, None, {}).replace("\\", "")
    assert "| 0.0017 | 0.0000 to 0.0123 | 0.0200 | +0.0183 | pass |" in twin
    assert note in twin
    page = html_report(pair, None, {})
    (row,) = [row for row in Elements(page).rows if row and row[0].startswith("JS2D")]
    assert [cell.strip() for cell in row[1:6]] == [
        note, "0.0017", "0.0000 to 0.0123", "0.0200", "+0.0183"
    ]  # fmt: skip
    bar = next(part for part in page.split("<tr") if ">JS2D <small>" in part)
    assert bar.startswith(' class="within"')
    assert f"width:{0.0017 / 0.02 / 1.5:.1%}" in bar
    assert f"{0.0123 / 0.02 / 1.5:.1%}" in bar


def test_a_verdict_that_point_estimates_deny_says_on_which_check_and_why() -> None:
    pair = few_tokens()
    why = (
        "by point estimates FAIL on js2d@UNION/64, plain 0.1003, biased upward with 2,594 tokens: "
        "the corrected 0.0017 decides)"
    )
    assert why in comparison_table(pair, width=100, color=False).splitlines()[-1]
    assert why in markdown_report(pair, None, {}).replace("\\", "")
    assert why in html_report(pair, None, {})


def test_a_change_has_one_interval_on_every_screen(pair: Comparison) -> None:
    """Also where the gate's is not that of the change itself."""
    verdict = pair.verdicts["keep24"]
    checks = tuple(
        replace(check, low=check.value - 0.5, high=check.value + 0.25) for check in verdict.checks
    )
    other = replace(pair, verdicts={"keep24": replace(verdict, checks=checks)})
    table = [line.split() for line in comparison_table(other, color=False).splitlines()]
    page = Elements(html_report(other, None, {}).replace("\xa0", " ")).rows
    twin = markdown_report(other, None, {}).replace("\\", "")
    names = [f"d{field}" for field in FIELDS]
    for check in checks:
        if check.name == "dppl_relative":  # of PPL as a share: no column shows it
            continue
        decimals, sign = FIELDS.get(check.name[1:], 4), check.name != "js2d"
        low, high = (oracle_number(end, decimals, signed=sign) for end in (check.low, check.high))
        at = next(i for i, row in enumerate(table) if row[:2] == ["UNION", str(check.seq_len)])
        column = names.index(check.name) if check.name in names else len(names)
        assert (table[at + 3][2 + column], table[at + 4][2 + column]) == (low, high)
        row = next(row for row in page if row[:2] == ["UNION", str(check.seq_len)])
        assert f"{low} to {high}" in row[4 + 3 * column - 2 * (not sign)].replace("\u2212", "-")
        assert f"({low} to {high})" in twin
    for report in ("\n".join(map(" ".join, table)), twin, str(page)):
        assert "±" not in report


@pytest.mark.parametrize(("rows", "told"), [(12, "12 conversations"), (1, "1 conversation")])
def test_a_verdict_says_on_how_much_it_rests(pair: Comparison, rows: int, told: str) -> None:
    """The least of what the gate reads."""
    sizes = {("UNION", 1024): (162_266, rows), ("UNION", 2048): (2_594, 3_000)}
    reports = {
        label: {
            key: replace(report, scored_tokens=size[0], rows=size[1])
            for key, report in by_key.items()
            for size in [sizes.get(key, (7, 0))]  # the gate reads no other
        }
        for label, by_key in pair.reports.items()
    }
    resting = replace(pair, reports=reports)
    said = f"FAIL on 2,594 tokens of {told}: "
    assert said in comparison_table(resting, width=100, color=False)
    assert markdown_report(resting, None, {}).startswith(f"## {said}")
    page = html_report(resting, None, {})
    assert f'<span class="status fail">FAIL</span> on 2,594 tokens of {told}</p>' in page
    assert f"<title>{said}keep24 against base</title>" in page


def test_it_says_what_so_few_conversations_can_have_missed(pair: Comparison) -> None:
    """And that bounds within their limits do not decide where there are too few."""
    verdict, (rows,) = pair.verdicts["keep24"], {r.rows for r in pair.reports["base"].values()}
    within = replace(
        verdict.checks[0], value=0.0, estimate=0.0, low=-0.1, high=0.1, limit=0.2,
        decided="INCONCLUSIVE",
    )  # fmt: skip
    reaching = replace(within, seq_len=2048, high=0.3)
    checks = (within, reaching)
    unsure = replace(verdict, status="INCONCLUSIVE", checks=checks)
    shown = replace(pair, verdicts={"keep24": unsure})
    pages = (
        comparison_table(shown, width=100, color=False),
        markdown_report(shown, None, {}),
        html_report(shown, None, {}),
    )
    for page in pages:
        said = re.search(rf"{rows} conversations may hold none of what befalls (\S+)% of all", page)
        assert said
        assert (1 - float(said[1]) / 100) ** rows == pytest.approx(0.05, rel=0.1)
        assert "of all: too few for a check whose bounds lie within the limit" in page
    assert "may hold none of" not in comparison_table(
        replace(shown, verdicts={"keep24": replace(unsure, confidence=None)}), color=False
    )


def test_the_change_of_perplexity_is_the_largest_that_the_gate_reads(pair: Comparison) -> None:
    changes = {
        key: pair.reports["keep24"][key].ppl / pair.reports["base"][key].ppl - 1
        for key in pair.base
        if key[0] == "UNION"
    }
    (pack, seq_len), most = max(changes.items(), key=lambda item: abs(item[1]))
    change = pair.changes["keep24"][pack, seq_len]["dppl_relative"]
    said = f"PPL {most:+.2%} ({change.low:+.2%} to {change.high:+.2%}), "
    for report in (html_report(pair, None, {}), markdown_report(pair, None, {})):
        plain = report.replace("\u2212", "-").replace("\\", "")
        assert re.search(rf"{re.escape(said)}\S+ → \S+ on {pack} at {seq_len}", plain)


def test_what_was_run_stands_in_page_and_twin(pair: Comparison) -> None:
    known = {"command": "python -m eaft_prune <b> | x", "machine": "a|b"}
    page = html_report(pair, None, {}, about=known)
    for label, fact in known.items():
        assert f"<dt>{label}</dt><dd>{html.escape(fact)}</dd>" in page
    twin = markdown_report(pair, None, {}, about=known)
    assert "| command | `python -m eaft_prune <b> \\| x` |" in twin
    assert "What was run" not in markdown_report(pair, None, {})
    assert 'class="about"' not in html_report(pair, None, {})


def test_the_worst_pack_is_the_one_whose_perplexity_grew_most(pair: Comparison) -> None:
    growth = {
        key: pair.reports["keep24"][key].ppl / pair.reports["base"][key].ppl - 1
        for key in pair.base
        if key[0] != "UNION"
    }
    (pack, seq_len), most = max(growth.items(), key=lambda item: item[1])
    change = pair.changes["keep24"][pack, seq_len]["dppl_relative"]
    line = (
        f"orst pack: {pack} at {seq_len}, PPL {most:+.1%} ({change.low:+.1%} to {change.high:+.1%})"
    )
    assert line in comparison_table(pair, width=100, color=False)
    assert line in markdown_report(pair, None, {}).replace("\\", "")
    assert line in html.unescape(html_report(pair, None, {})).replace("\u2212", "-")


def test_without_intervals_reports_show_none() -> None:
    pair = comparison({"c": 0.1}, packs=("UNION",), seq_lens=(64,), tokens=200)
    check = replace(pair.verdicts["c"].checks[0], decided=None, low=None, high=None, passed=True)
    bare = replace(pair, changes={}, verdicts={"c": GateVerdict("g", "PASS", (check,))})
    for report in (comparison_table(bare, width=100), markdown_report(bare, None, {})):
        assert "±" not in report
        assert "confidence" not in report
    assert "95%" not in html_report(bare, None, {}).split("<script>")[1].split("Every pack")[0]


@given(
    st.floats(-0.5, 0.5).filter(lambda v: v == 0 or abs(v) > 1e-7),
    st.sampled_from([0.002, 0.02, 0.25]),
)
def test_check_rows_tell_on_which_side_of_the_limit_a_value_is(value: float, limit: float) -> None:
    small = comparison({"c": 0.1}, packs=("UNION",), seq_lens=(64,), tokens=50)
    passed = abs(value) <= limit
    check = replace(
        small.verdicts["c"].checks[0], value=value, limit=limit, passed=passed,
        decided=None, estimate=None, low=None, high=None,
    )  # fmt: skip
    verdict = GateVerdict("g", "PASS" if passed else "FAIL", (check,))
    table = comparison_table(replace(small, verdicts={"c": verdict}), width=100, color=False)
    row = next(line.split() for line in table.splitlines() if line.startswith("Δ PPL"))
    shown, shown_limit, margin, result = (row[-4], row[-3], row[-2], row[-1])
    assert float(shown) == pytest.approx(value, abs=6e-5)
    assert float(margin) == pytest.approx(limit - abs(value), abs=6e-5)
    assert result == ("pass" if passed else "FAIL")
    if abs(abs(value) - limit) > 2e-8:
        assert (abs(float(shown)) <= float(shown_limit)) == passed


def test_embedded_histograms_are_those_of_numpy_and_sum_to_the_scored_tokens(
    pair: Comparison, page: str
) -> None:
    data = embedded(page)
    assert data["bins"] == [160, 120]
    for view in data["views"]:
        key = (view["pack"], view["seqLen"])
        models = [(view["base"], pair.base), (view["candidates"][0], pair.candidates[0])]
        for shown, evaluation in models:
            counts = unpacked(shown["histogram"])
            scores = evaluation.scores[key]
            oracle = np.histogram2d(
                scores.p_T, scores.entropy_T, bins=(160, 120), range=((0, 1), (0, 1))
            )[0]
            assert counts.sum() == pair.reports["base"][key].scored_tokens == view["tokens"]
            np.testing.assert_array_equal(counts.reshape(160, 120), oracle)
            assert shown["pq"] == pytest.approx(np.quantile(scores.p_T, 0.15), abs=1e-6)
            assert shown["hq"] == pytest.approx(np.quantile(scores.entropy_T, 0.15), abs=1e-6)


def test_paired_samples_are_the_same_tokens_of_both_models() -> None:
    same = comparison({"copy": 0.0, "noisy": 1.0}, tokens=5_000)
    for view in embedded(html_report(same, None, {}))["views"]:
        base = unpacked(view["base"]["sample"])
        copy, noisy = (unpacked(candidate["sample"]) for candidate in view["candidates"])
        assert len(base) == 2_000
        np.testing.assert_array_equal(base, copy)
        assert np.corrcoef(base, noisy)[0, 1] > 0.8
        p = same.base.scores[view["pack"], view["seqLen"]].p_T
        assert set(base.tolist()) <= set(np.round(p * 65_535).astype(int).tolist())
        assert view["candidates"][0]["moved"] == 0


def test_many_histograms_are_merged_and_still_sum_to_the_scored_tokens() -> None:
    many = comparison({f"c{i}": 0.1 for i in range(9)}, tokens=400)
    data = embedded(html_report(many, None, {}))
    assert data["bins"] == [80, 60]
    for view in data["views"]:
        for model in (view["base"], *view["candidates"]):
            assert unpacked(model["histogram"]).sum() == 400


def test_page_refers_to_no_network(page: str) -> None:
    elements = Elements(page)
    for tag, attributes in elements.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base")
        for name in ("src", "srcset", "href", "action", "data", "poster"):
            assert (attributes.get(name) or "#").startswith("#"), (tag, attributes)
    styles = "".join(re.findall(r"<style>(.*?)</style>", page, re.S))
    assert "url(" not in styles
    assert "@import" not in styles
    policy = next(a["content"] for t, a in elements.tags if a.get("http-equiv"))
    assert policy
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-eval" not in policy
    assert "http" not in policy


def test_foreign_text_is_escaped_everywhere() -> None:
    nasty = comparison({NASTY: 0.2}, packs=(f"p{NASTY}", f"u{NASTY}"), base=f"b{NASTY}")
    facts = {NASTY: NASTY, "group": {NASTY: [NASTY]}}
    chosen = replace(selection(2, 8, 4), criterion=NASTY)
    page = html_report(nasty, chosen, facts)
    elements = Elements(page)
    clean = Elements(html_report(comparison({"a": 0.2}, packs=("p", "u")), chosen, {"a": "b"}))
    kinds = {tag for tag, _ in clean.tags}
    assert {tag for tag, _ in elements.tags} <= kinds | {"details", "summary"}
    assert len(elements.scripts) == len(clean.scripts) == 4
    assert "alert(1)</script>" not in page
    assert html.escape(NASTY) in page
    assert embedded(page)["candidates"] == [NASTY]
    twin = markdown_report(nasty, chosen, facts)
    outside_code = re.sub(r"(`+)[^`].*?\1(?!`)", "", twin.replace("\\`", ""))
    assert not re.search(r"(?<!\\)<(?!/?details>|/?summary>|br>)", outside_code)
    assert "\x1b" not in twin + comparison_table(nasty, width=100, color=False)


def test_piped_table_has_no_colour_and_fits_its_width(pair: Comparison) -> None:
    plain = comparison_table(pair, width=100)
    assert "\x1b" not in plain
    assert max(map(len, plain.splitlines()[:-1])) <= 100
    assert "\x1b[" in comparison_table(pair, width=100, color=True)


def test_base_alone_has_a_table_but_no_report(pair: Comparison) -> None:
    alone = replace(pair, candidates=(), verdicts={})
    table = comparison_table(alone, width=100, color=False)
    assert [line.split()[0] for line in table.splitlines()[2:]] == [
        pack for pack in ("UNION", *PACKS[:-1]) for _ in SEQ_LENS
    ]
    with pytest.raises(ValueError, match="no candidate"):
        html_report(alone, None, {})
    with pytest.raises(ValueError, match="no candidate"):
        markdown_report(alone, None, {})


def test_leaderboard_puts_passing_before_failing_and_small_dppl_first() -> None:
    several = comparison({"worst": 2.0, "same": 0.0, "middle": 0.9}, tokens=20_000)
    twin = markdown_report(several, None, {})
    head = "## 1 of 3 candidates pass on 20,000 tokens of 66 conversations\n"
    assert twin.startswith(head)
    places = [twin.index(f"| {label} |") for label in ("same", "middle", "worst")]
    assert places == sorted(places)
    table = comparison_table(several, color=False).splitlines()
    assert [line.split()[0] for line in table[-3:]] == ["same", "middle", "worst"]
    picks = [a["data-pick"] for _, a in Elements(html_report(several, None, {})).tags
             if "data-pick" in a]  # fmt: skip
    assert picks == ["same", "middle", "worst"]


def broken(pair: Comparison, how: str) -> Comparison:
    key = ("UNION", 1024)
    candidate, reports = pair.candidates[0], dict(pair.reports)
    if how == "no reports":
        del reports["keep24"]
    elif how == "no verdict":
        return replace(pair, verdicts={})
    elif how == "no checks":
        return replace(pair, verdicts={"keep24": GateVerdict("g", "PASS", ())})
    elif how == "yet":
        return replace(pair, verdicts={"keep24": replace(pair.verdicts["keep24"], status="PASS")})
    elif how == "was evaluated on":
        reports["keep24"] = {key: reports["keep24"][key]}
    elif how == "not the same blocks":
        reports["keep24"] = {
            **reports["keep24"],
            key: replace(reports["keep24"][key], scored_tokens=7),
        }
    elif how == "no scored tokens":
        reports["keep24"] = {
            **reports["keep24"],
            key: replace(reports["keep24"][key], scored_tokens=0),
        }
    elif how == "NaN":
        reports["keep24"] = {
            **reports["keep24"],
            key: replace(reports["keep24"][key], ppl=float("nan")),
        }
    elif how == "different labels":
        return replace(pair, candidates=(candidate, candidate))
    elif how == "different tokens":
        digests = {**candidate.token_digests, key: "other"}
        return replace(pair, candidates=(replace(candidate, token_digests=digests),))
    return replace(pair, reports=reports)


@pytest.mark.parametrize(
    "how",
    [
        "no reports", "no verdict", "no checks", "yet", "was evaluated on", "not the same blocks",
        "no scored tokens", "NaN", "different labels",
    ],
)  # fmt: skip
def test_what_does_not_fit_together_is_refused(pair: Comparison, how: str) -> None:
    bad = broken(pair, how)
    for render in (
        lambda: comparison_table(bad),
        lambda: markdown_report(bad, None, {}),
        lambda: html_report(bad, None, {}),
    ):
        with pytest.raises(ValueError, match=how):
            render()


def test_plots_of_unpaired_evaluations_are_refused(pair: Comparison) -> None:
    with pytest.raises(ValueError, match="different tokens"):
        html_report(broken(pair, "different tokens"), None, {})


def test_selection_must_fit_its_plan_and_a_candidate(pair: Comparison) -> None:
    chosen = selection(4, 8, 4)
    with pytest.raises(ValueError, match="the candidates are"):
        html_report(pair, {"other": chosen}, {})
    wrong = replace(chosen, plan=KeepPlan(chosen.plan.kept[:3], 8))
    with pytest.raises(ValueError, match=r"\(3, 8\)"):
        markdown_report(pair, wrong, {})


def test_tie_zone_ranks_and_kept_set() -> None:
    score = np.array([[10.0, 5.1, 5.0, 0.0], [4.0, 4.0, 4.0, 4.0]])
    count = np.array([[4, 2, 1, 1], [0, 0, 0, 0]])
    scores = ExpertScores(score, score, count, {"good": 1}, score[None])
    experts = expert_map(Selection("c", scores, KeepPlan(((0, 1), (0, 1, 2, 3)), 4), {}))
    assert experts.tied_LE.tolist() == [[False, True, True, False], [False] * 4]
    assert experts.rank_LE.tolist() == [[0, 1, 2, 3], [0, 1, 2, 3]]
    assert experts.kept_LE.tolist() == [[True, True, False, False], [True] * 4]
    assert experts.load_LE.tolist() == [[2.0, 1.0, 0.5, 0.5], [0.0] * 4]


def test_markdown_lists_exactly_the_dropped_experts(pair: Comparison) -> None:
    chosen = selection(3, 16, 12)
    twin = markdown_report(pair, chosen, {})
    assert "keeps 12 of 16 experts in each of 3 layers" in twin
    for layer, kept in enumerate(chosen.plan.kept):
        dropped = id_ranges(sorted(set(range(16)) - set(kept)))
        assert f"| {layer} | {dropped} |" in twin


@given(st.sets(st.integers(0, 200)))
def test_id_ranges_name_every_id_once(ids: set[int]) -> None:
    named: list[int] = []
    for part in filter(None, id_ranges(sorted(ids)).split(", ")):
        first, _, last = part.partition("-")
        named.extend(range(int(first), int(last or first) + 1))
    assert named == sorted(ids)


@given(st.floats(-1e7, 1e7), st.integers(2, 6))
def test_numbers_read_back(value: float, decimals: int) -> None:
    shown = number(value, decimals, signed=True)
    tolerance = 0.5 if abs(value) >= 10_000 else 0.5001 * 10**-decimals
    assert float(shown.replace(",", "")) == pytest.approx(value, abs=tolerance)


def test_equal_inputs_give_equal_reports(pair: Comparison, page: str) -> None:
    again = comparison({"keep24": 0.6})
    assert html_report(again, selection(), FACTS) == page
    assert markdown_report(again, selection(), FACTS) == markdown_report(pair, selection(), FACTS)


@pytest.mark.slow
def test_size_and_time_at_full_scale() -> None:
    large = comparison({"keep24": 0.1}, tokens=150_000)
    start = time.process_time()
    page = html_report(large, selection(), FACTS)
    assert time.process_time() - start < 3
    assert len(page.encode()) <= 8_000_000


@pytest.mark.process
def test_importing_the_report_does_not_import_plotly() -> None:
    code = "import sys, eaft_prune.report; sys.exit('plotly' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_facts_are_lines_and_mappings_of_mappings_tables() -> None:
    rows = {"a": {"x": 0.5, "name": "b c"}, "long": {"x": -1.25, "n": 3}}
    lines = facts_text({"tokens": 7, "plain": {"k": 1}, "table": rows}).splitlines()
    assert lines[0].split() == ["tokens", "7"]
    assert lines[1].split(maxsplit=1) == ["plain", "{'k': 1}"]
    table = [line.split() for line in (lines[3], *lines[5:7])]  # below the heads a rule
    assert table[0] == ["table", "x", "name", "n"]
    assert table[1] == ["a", "0.5000", "b", "c"]
    assert table[2] == ["long", "-1.2500", "3"]
    ends = {
        line.rindex(w) + len(w)
        for line, w in zip((lines[3], *lines[5:7]), ("x", "00", "00"), strict=True)
    }
    assert len(ends) == 1
