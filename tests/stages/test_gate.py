"""The gate is four inequalities at each length; the seeds' tables get the seeds' verdicts."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.gates import LENGTHS, both, report, v1

from eaft_prune.core.types import EvalKey, UserError
from eaft_prune.core.verdict import GateVerdict, PackReport
from eaft_prune.stages.gate import gate

# (ppl, cc_rate, mean p) on UNION at 1024 and 2048: seeds/001, "EAFT-REAP Quality Snapshot"
SNAPSHOT = {
    "base": ((5.237, 0.000632, 0.4746), (4.716, 0.001187, 0.4823)),
    "HF REAP 0.5": ((7.649, 0.001590, 0.4158), (6.574, 0.002411, 0.4285)),
    "EAFT-REAP-50": ((7.290, 0.001869, 0.4213), (6.357, 0.002604, 0.4304)),
    "EAFT-REAP-25": ((18.272, 0.005183, 0.3046), (15.859, 0.006315, 0.3101)),
}
# the same per pack, base and pruned: seeds/000, "20B pruning diagnostics"
DIAGNOSTICS = {
    "reasoning_style_10k_v2": (
        ((5.695, 0.0026, 0.4381), (4.327, 0.0004, 0.4963)),
        ((7.651, 0.0038, 0.3902), (6.622, 0.0021, 0.4309)),
    ),
    "tool_agentic_10k_v6": (
        ((6.024, 0.0014, 0.4826), (5.305, 0.0013, 0.5120)),
        ((8.466, 0.0029, 0.4142), (7.743, 0.0031, 0.4345)),
    ),
    "calib_prompt_10000_v2": (
        ((4.745, 0.0001, 0.5073), (4.685, 0.0003, 0.4926)),
        ((5.975, 0.0006, 0.4678), (6.056, 0.0010, 0.4519)),
    ),
    "UNION": (
        ((5.752, 0.0019, 0.4462), (4.613, 0.0014, 0.4849)),
        ((7.638, 0.0034, 0.3960), (6.374, 0.0028, 0.4288)),
    ),
}
Row = tuple[tuple[float, float, float], tuple[float, float, float]]


def table(row: Row, js: float = 0.0, pack: str = "UNION") -> dict[EvalKey, PackReport]:
    return {
        (pack, seq_len): report(*values, js) for seq_len, values in zip(LENGTHS, row, strict=True)
    }


def failed(verdict: GateVerdict) -> set[str]:
    assert set(verdict.failed_checks) == {c.label for c in verdict.checks if not c.passed}
    assert (verdict.status == "PASS") == (not verdict.failed_checks)
    return set(verdict.failed_checks)


def everywhere(*names: str, pack: str = "UNION") -> set[str]:
    return {f"{name}@{pack}/{seq_len}" for name, seq_len in itertools.product(names, LENGTHS)}


def test_the_base_row_passes_against_itself() -> None:
    row = SNAPSHOT["base"]
    verdict = gate(v1(), table(row), table(row))
    assert verdict.status == "PASS"
    assert len(verdict.checks) == 10
    assert all(check.value == 0 for check in verdict.checks)


@pytest.mark.parametrize("js", [0.01, 0.05])
@pytest.mark.parametrize(
    ("model", "failing"),
    [
        ("HF REAP 0.5", ("dppl", "dppl_relative", "dmean_prob")),
        ("EAFT-REAP-50", ("dppl", "dppl_relative", "dmean_prob")),
        ("EAFT-REAP-25", ("dppl", "dppl_relative", "dcc_rate", "dmean_prob")),
    ],
)
def test_the_snapshots_rows_fail_as_published(
    model: str, failing: tuple[str, ...], js: float
) -> None:
    verdict = gate(v1(), table(SNAPSHOT["base"]), table(SNAPSHOT[model], js))
    assert verdict.status == "FAIL"
    assert failed(verdict) == everywhere(*failing, *(["js2d"] if js > 0.02 else []))


def test_the_published_deltas_are_the_checks_values() -> None:
    verdict = gate(v1(), table(SNAPSHOT["base"]), table(SNAPSHOT["EAFT-REAP-50"]))
    values = {check.label: check.value for check in verdict.checks}
    for label, delta in {
        "dppl@UNION/1024": 2.053, "dppl@UNION/2048": 1.641,
        "dcc_rate@UNION/1024": 0.001237, "dcc_rate@UNION/2048": 0.001418,
        "dmean_prob@UNION/1024": -0.0533, "dmean_prob@UNION/2048": -0.0519,
    }.items():  # fmt: skip
        assert values[label] == pytest.approx(delta, abs=1.1e-3 if "ppl" in label else 1e-5)
    assert values["dppl_relative@UNION/1024"] == pytest.approx(2.053 / 5.237, abs=1e-4)


@pytest.mark.parametrize("pack", list(DIAGNOSTICS))
def test_the_diagnostics_rows_fail_on_every_pack(pack: str) -> None:
    base, pruned = DIAGNOSTICS[pack]
    settings = v1(pack=pack)
    assert gate(settings, table(base, pack=pack), table(base, pack=pack)).status == "PASS"
    verdict = gate(settings, table(base, pack=pack), table(pruned, 0.01, pack))
    assert failed(verdict) == everywhere("dppl", "dppl_relative", "dmean_prob", pack=pack)


@given(
    base_ppl=st.floats(1, 30),
    dppl=st.floats(-1, 1),
    dcc=st.floats(-0.004, 0.004),
    dp=st.floats(-0.04, 0.04),
    js=st.floats(0, 0.04),
)
def test_the_verdict_is_the_inequalities(
    base_ppl: float, dppl: float, dcc: float, dp: float, js: float
) -> None:
    base = both(ppl=base_ppl, cc=0.01, p=0.5)
    other = both(ppl=base_ppl + dppl, cc=0.01 + dcc, p=0.5 + dp, js=js)
    expected = set()
    change = (base_ppl + dppl) - base_ppl
    if abs(change) > 0.25:
        expected |= everywhere("dppl")
    if abs(change / base_ppl) > 0.05:
        expected |= everywhere("dppl_relative")
    if abs((0.01 + dcc) - 0.01) > 0.002:
        expected |= everywhere("dcc_rate")
    if abs((0.5 + dp) - 0.5) > 0.02:
        expected |= everywhere("dmean_prob")
    if js > 0.02:
        expected |= everywhere("js2d")
    assert failed(gate(v1(), base, other)) == expected


@pytest.mark.parametrize("sign", [1, -1])
def test_a_change_for_the_better_fails_like_one_for_the_worse(sign: int) -> None:
    """Near-lossless is near: a pruned model that reads better is another model."""
    verdict = gate(v1(), both(), both(ppl=5 + sign * 0.3, p=0.5 + sign * 0.03))
    assert failed(verdict) == everywhere("dppl", "dppl_relative", "dmean_prob")


def test_a_value_on_its_limit_passes() -> None:
    settings = v1(max_dppl=0.25, max_dppl_relative=0.125, max_dmean_prob=0.25, max_dcc_rate=0.5)
    limit = both(ppl=2.25, cc=0.5, p=0.75, js=0.02)
    assert gate(settings, both(ppl=2, cc=0.0), limit).status == "PASS"
    beyond = both(ppl=math.nextafter(2.25, 3), cc=0.5, p=0.75, js=math.nextafter(0.02, 1))
    assert failed(gate(settings, both(ppl=2, cc=0.0), beyond)) == everywhere(
        "dppl", "dppl_relative", "js2d"
    )


@pytest.mark.parametrize("seq_len", LENGTHS)
def test_one_length_that_fails_is_enough(seq_len: int) -> None:
    other = {**both(), ("UNION", seq_len): report(js=0.5)}
    assert failed(gate(v1(), both(), other)) == {f"js2d@UNION/{seq_len}"}


def test_other_packs_and_lengths_are_not_read() -> None:
    other = {**both(), ("UNION", 4096): report(ppl=99), ("a", 1024): report(ppl=math.nan)}
    assert gate(v1(), both(), other).status == "PASS"


def test_the_corrected_js2d_and_the_base_thresholds_are_not_read() -> None:
    other = both(js2d_corrected=0.5, cc_rate_base_thr=0.9, mean_entropy=0.9)
    assert gate(v1(), both(), other).status == "PASS"


@pytest.mark.parametrize("side", ["base", "candidate"])
@pytest.mark.parametrize("key", [("UNION", 1024), ("UNION", 2048)])
def test_a_missing_report_is_named(side: str, key: EvalKey) -> None:
    sides = {"base": both(), "candidate": both()}
    del sides[side][key]
    with pytest.raises(UserError, match=rf"UNION.*{key[1]}.*{side}"):
        gate(v1(), **sides)


def test_no_reports_at_all_are_no_pass() -> None:
    with pytest.raises(UserError):
        gate(v1(), {}, {})


@pytest.mark.parametrize("side", ["base", "candidate"])
@pytest.mark.parametrize(
    "bad",
    [
        {"ppl": math.nan},
        {"ppl": math.inf},
        {"cc": math.nan},
        {"p": math.nan},
        {"js": math.nan},
        {"scored_tokens": 0},
        {"scored_tokens": -1},
    ],
    ids=str,
)
def test_an_empty_or_nan_report_is_no_verdict(side: str, bad: dict[str, Any]) -> None:
    sides = {"base": both(), "candidate": both()}
    sides[side]["UNION", 2048] = report(**bad)
    with pytest.raises(ValueError, match=side):
        gate(v1(), **sides)


def test_reports_of_different_tokens_are_no_verdict() -> None:
    with pytest.raises(ValueError, match=r"1000.*999"):
        gate(v1(), both(), both(scored_tokens=999))
    with pytest.raises(ValueError, match="block"):
        gate(v1(), both(), both(blocks=5))
    with pytest.raises(ValueError, match="rows"):
        gate(v1(), both(), both(rows=5))
