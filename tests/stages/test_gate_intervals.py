"""The three-valued verdict: what is sure, how sure, and what would settle the rest."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t as student_t
from support.gates import LENGTHS, ROWS, ZERO, around, both, changed, report, v1

from eaft_prune.config import GateSettings
from eaft_prune.core.types import EvalKey
from eaft_prune.core.verdict import Estimate, GateCheck, GateVerdict
from eaft_prune.stages.gate import gate

LIMITS = {
    "dppl": 0.25, "dppl_relative": 0.05, "dcc_rate": 0.002, "dmean_prob": 0.02, "js2d": 0.02
}  # fmt: skip
NAMES = tuple(LIMITS)


def judged(settings: GateSettings | None = None, ppl: float = 8.0, **e: Estimate) -> GateVerdict:
    """One length; the reports say what the estimates are about."""
    settings = settings or v1(seq_lens=(1024,))
    values = {name: e.get(name, ZERO).value for name in NAMES}
    key = ("UNION", 1024)
    base = report(ppl=ppl, cc=0.1, p=0.5, rows=ROWS)
    other = report(
        ppl=ppl + values["dppl"], cc=0.1 + values["dcc_rate"], p=0.5 + values["dmean_prob"],
        js=max(values["js2d"], 0), rows=ROWS,
    )  # fmt: skip
    return gate(settings, {key: base}, {key: other}, {key: changed(**e)})


def outcomes(verdict: GateVerdict) -> dict[str, str]:
    return {check.name: check.outcome for check in verdict.checks}


@given(
    st.fixed_dictionaries(
        {name: st.tuples(st.floats(-2, 2), st.floats(0.01, 0.8)) for name in NAMES}
    ),
    st.sampled_from([0.8, 0.95, 0.98]),
)
def test_the_verdict_is_its_definition(
    drawn: dict[str, tuple[float, float]], confidence: float
) -> None:
    """Values and errors in units of the limit."""
    few = math.sqrt((ROWS - 1) / (ROWS + 1))  # the imagined row
    inner = few * student_t.ppf(confidence, ROWS)
    outer = few * student_t.ppf(1 - (1 - confidence) / (2 * len(NAMES)), ROWS)
    expected, given_ = {}, {}
    for name, (value, error) in drawn.items():
        value = abs(value) if name == "js2d" else value
        given_[name] = around(value * LIMITS[name], error * LIMITS[name], confidence)
        inside = abs(value) + inner * error <= 1
        outside = abs(value) - outer * error > 1
        expected[name] = "PASS" if inside else "FAIL" if outside else "INCONCLUSIVE"
    verdict = judged(v1(seq_lens=(1024,), confidence=confidence), **given_)
    assert outcomes(verdict) == expected
    kinds = set(expected.values())
    one = "FAIL" if "FAIL" in kinds else "PASS" if kinds == {"PASS"} else "INCONCLUSIVE"
    assert verdict.status == one
    assert verdict.failed_checks == tuple(
        f"{name}@UNION/1024" for name in NAMES if expected[name] == "FAIL"
    )
    assert verdict.undecided_checks == tuple(
        f"{name}@UNION/1024" for name in NAMES if expected[name] == "INCONCLUSIVE"
    )
    assert (verdict.plain == "PASS") == (not verdict.plain_failed_checks)


def test_on_a_limit_a_wrong_pass_or_fail_is_as_rare_as_asked() -> None:
    """All values exactly on their limits: PASS would be wrong, and so would FAIL."""
    rng = np.random.default_rng(0)
    count = {"PASS": 0, "FAIL": 0, "INCONCLUSIVE": 0}
    alone = dict(count)
    for _ in range(800):
        noise = rng.standard_t(ROWS - 1, len(NAMES))
        drawn = {
            name: around(LIMITS[name] * (1 + 0.1 * z), 0.1 * LIMITS[name])
            for name, z in zip(NAMES, noise, strict=True)
        }
        count[judged(**drawn).status] += 1
        alone[judged(dcc_rate=drawn["dcc_rate"]).status] += 1
    slack = 3 * math.sqrt(0.05 * 0.95 / 800)
    assert count["FAIL"] / 800 < 0.05 + slack
    assert count["PASS"] / 800 < 0.05
    assert 0.05 - slack < alone["PASS"] / 800 < 0.05 + slack  # one check at its limit: exactly


def test_equal_models_pass_whatever_the_limits() -> None:
    zero = v1(seq_lens=(1024,), max_dppl=0, max_dcc_rate=0, max_dmean_prob=0, max_js2d=0)
    for settings in (v1(seq_lens=(1024,)), zero):
        verdict = judged(settings)
        assert (verdict.status, verdict.plain) == ("PASS", "PASS")
        assert set(outcomes(verdict).values()) == {"PASS"}


def test_the_plain_verdict_reads_plain_js2d_and_the_interval_the_corrected_one() -> None:
    key = ("UNION", 1024)
    settings = v1(seq_lens=(1024,))
    base, other = report(rows=ROWS), report(js=0.05, js2d_corrected=0.004, rows=ROWS)
    verdict = gate(settings, {key: base}, {key: other}, {key: changed(js2d=around(0.004, 0.001))})
    assert (verdict.status, verdict.plain) == ("PASS", "FAIL")
    assert verdict.plain_failed_checks == ("js2d@UNION/1024",)
    check = verdict.checks[-1]
    assert (check.value, check.estimate, check.passed, check.outcome) == (
        0.05,
        0.004,
        False,
        "PASS",
    )


def test_both_limits_on_ppl_must_hold() -> None:
    """At PPL 1, 4% are 0.04 nats and within both; at PPL 8 the absolute one is the stricter."""
    ratio, change = around(0.04, 0.003), around(0.04, 0.03)
    assert judged(ppl=1.0, dppl=change, dppl_relative=ratio).status == "PASS"
    assert judged(ppl=1.0, dppl=change, dppl_relative=change).undecided_checks == (
        "dppl_relative@UNION/1024",
    )
    verdict = judged(ppl=8.0, dppl=around(0.32, 0.01), dppl_relative=ratio)
    assert verdict.failed_checks == ("dppl@UNION/1024",)
    check = next(c for c in verdict.checks if c.name == "dppl_relative")
    assert (check.low, check.high, check.limit) == (ratio.low, ratio.high, 0.05)


def test_passing_takes_rows_enough_to_meet_what_is_rare() -> None:
    """299 conversations: 1% of all are then among them with 95%; failing takes no such number."""
    small, large = around(0.001, 0.0001), around(0.2, 0.001)

    def at(rows: int, estimate: Estimate, **how: float) -> GateCheck:
        key = ("UNION", 1024)
        sides = [{key: report(p=p, rows=rows)} for p in (0.5, 0.5 + estimate.value)]
        found = replace(changed(dmean_prob=estimate), rows=rows)
        verdict = gate(v1(seq_lens=(1024,), **how), *sides, {key: found})
        return next(check for check in verdict.checks if check.name == "dmean_prob")

    assert (1 - 0.01) ** 299 < 0.05 < (1 - 0.01) ** 298
    assert [at(rows, small).outcome for rows in (298, 299)] == ["INCONCLUSIVE", "PASS"]
    assert at(100, small).settled_at == 299
    assert at(20, large).outcome == "FAIL"
    assert at(29, small, rarest=0.1).outcome == "PASS"
    assert at(28, small, rarest=0.1).outcome == "INCONCLUSIVE"
    assert at(3, ZERO).outcome == "PASS"  # equal scores need none


@pytest.mark.parametrize(("value", "end"), [(0.9, "PASS"), (-0.8, "PASS"), (1.2, "FAIL")])
def test_settled_at_is_where_the_verdict_ends(value: float, end: str) -> None:
    """The error of n rows is that of 400 times sqrt(400 / n)."""
    error = 0.3

    def at(rows: float) -> GateVerdict:
        scaled = error * 0.02 * math.sqrt(ROWS / rows)
        changes = replace(
            changed(dmean_prob=replace(ZERO, value=0.02 * value, error=scaled)), rows=round(rows)
        )
        sides = [
            {("UNION", 1024): report(p=p, rows=round(rows))} for p in (0.5, 0.5 + 0.02 * value)
        ]
        return gate(v1(seq_lens=(1024,)), *sides, {("UNION", 1024): changes})

    first = at(ROWS)
    assert first.status == "INCONCLUSIVE"
    assert first.settled_by is not None
    needed = first.settled_by.settled_at
    assert needed is not None
    assert needed > ROWS
    assert at(needed * 1.01).status == end
    assert at(needed * 0.97).status == "INCONCLUSIVE"


def test_who_decides_an_inconclusive_verdict() -> None:
    inside, far = around(0.018, 0.004), around(0.0019, 0.0004)
    verdict = judged(dmean_prob=inside, dcc_rate=far)
    assert verdict.settled_by is not None
    # all that lean inside must be settled, the slowest is the last
    assert verdict.settled_by.name == "dcc_rate"
    outside = around(0.024, 0.004)
    verdict = judged(dmean_prob=outside, dcc_rate=far, js2d=around(0.0205, 0.004))
    assert verdict.settled_by is not None
    assert verdict.settled_by.name == "dmean_prob"  # the first that leans outside is enough
    assert judged(dmean_prob=around(0.02, 0.004)).settled_by is None  # on the limit: never
    assert judged().settled_by is None


def test_too_few_rows_decide_nothing() -> None:
    verdict = gate(v1(), both(), both(ppl=5.001), {})
    assert (verdict.status, verdict.plain) == ("INCONCLUSIVE", "PASS")
    assert len(verdict.undecided_checks) == 10
    assert verdict.settled_by is None
    assert all(check.low is None for check in verdict.checks)


def test_without_confidence_or_changes_the_plain_verdict_stands_alone() -> None:
    for changes, settings in ((None, v1()), ({}, v1(confidence=None))):
        for ppl, status in ((5.0, "PASS"), (6.0, "FAIL")):
            verdict = gate(settings, both(), both(ppl=ppl), changes)
            assert verdict.status == verdict.plain == status
            assert all(check.decided is None for check in verdict.checks)


def several(**ppl: float) -> dict[EvalKey, Any]:
    return {(pack, s): report(ppl=value) for pack, value in ppl.items() for s in LENGTHS}


def test_further_packs_hold_the_limits_they_name() -> None:
    settings = v1(packs={"tools": {"max_dppl": 0.5, "max_js2d": 0.1}})
    base = several(UNION=5, tools=5, chat=5)
    verdict = gate(settings, base, several(UNION=5.2, tools=5.4, chat=9))
    assert verdict.status == "PASS"
    assert [c.label for c in verdict.checks if c.pack == "tools"] == [
        f"{name}@tools/{s}" for s in LENGTHS for name in ("dppl", "js2d")
    ]
    verdict = gate(settings, base, several(UNION=5.2, tools=5.6, chat=5))
    assert verdict.failed_checks == ("dppl@tools/1024", "dppl@tools/2048")


def test_default_limits_hold_for_all_other_packs() -> None:
    settings = v1(packs={"default": {"max_dppl": 0.5}, "tools": {"max_dppl_relative": 0.2}})
    base = several(tools=5, chat=5, UNION=5)
    verdict = gate(settings, base, several(tools=5.9, chat=5.6, UNION=5))
    limits = {(c.pack, c.name): c.limit for c in verdict.checks if "dppl" in c.name}
    assert limits == {
        ("UNION", "dppl"): 0.25, ("UNION", "dppl_relative"): 0.05, ("chat", "dppl"): 0.5,
        ("tools", "dppl_relative"): 0.2,
    }  # fmt: skip
    assert verdict.checks[0].pack == "UNION"
    assert verdict.failed_checks == ("dppl@chat/1024", "dppl@chat/2048")


def test_an_inequality_of_a_pack_without_a_report_is_refused() -> None:
    with pytest.raises(ValueError, match="tools"):
        gate(v1(packs={"tools": {"max_dppl": 1}}), both(), both())


def test_a_pack_without_a_limit_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one limit"):
        v1(packs={"tools": {}})


def test_checks_are_what_the_report_and_the_change_say() -> None:
    estimate = around(0.01, 0.002)
    check = next(c for c in judged(dmean_prob=estimate).checks if c.name == "dmean_prob")
    assert (check.estimate, check.low, check.high) == (0.01, estimate.low, estimate.high)
    assert check.value == pytest.approx(0.01)
    assert replace(check, decided=None).outcome == "PASS"
