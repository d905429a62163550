"""near_lossless_v2: v1's checks and more, on every pack; no PASS of what was not measured."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from support.gates import ROWS, around, changed, report
from support.runs import REPOSITORY

from eaft_prune.config import GateSettings
from eaft_prune.core.types import EvalKey
from eaft_prune.core.verdict import Changes, GateVerdict, PackReport
from eaft_prune.stages.gate import gate

KEYS: tuple[EvalKey, ...] = (("UNION", 1024), ("UNION", 2048), ("tools", 1024), ("tools", 2048))
MEASURED = {"kl_mean": 0.001, "kl_p99": 0.01, "top1_flips": 0.004}
GENERATED = ("dloop_rate", "dended_rate", "dwell_formed_rate", "dtask_accuracy")
RECOVERED = {"quiz": 0.0}


def v2(**changes: Any) -> GateSettings:
    parts = [
        yaml.safe_load((REPOSITORY / f"conf/gate/near_lossless_v{n}.yaml").read_text())
        for n in (1, 2)
    ]
    return GateSettings(
        **{**parts[0], **{k: v for k, v in parts[1].items() if k != "defaults"}, **changes}
    )


def estimates(**values: float) -> Changes:
    return changed(**{name: around(value, 1e-5) for name, value in values.items()})


def judged(
    worse: dict[EvalKey, dict[str, float]] | None = None,
    generated: Changes | None = None,
    known: dict[str, float] = MEASURED,
    recovery: dict[str, float] = RECOVERED,
) -> GateVerdict:
    worse = worse or {}
    values = {key: {**known, **worse.get(key, {})} for key in KEYS}
    base: dict[EvalKey, PackReport] = {key: report(rows=ROWS) for key in KEYS}
    other = {key: report(rows=ROWS, further=values[key]) for key in KEYS}
    changes = {key: estimates(**values[key]) for key in KEYS}
    tasks = {task: estimates(dtask_recovery=value) for task, value in recovery.items()}
    return gate(v2(), base, other, changes, () if generated is None else (generated,), tasks)


def written(**values: float) -> Changes:
    return estimates(**{**dict.fromkeys(GENERATED, 0.0), **values})


def test_all_within_and_all_measured_is_a_pass() -> None:
    verdict = judged(generated=written())
    assert (verdict.status, verdict.plain, verdict.missing) == ("PASS", "PASS", ())
    v1 = {"dppl", "dppl_relative", "dcc_rate", "dmean_prob", "js2d"}
    union = {check.name for check in verdict.checks if check.pack == "UNION"}
    assert union == v1 | set(MEASURED)
    tools = {check.name for check in verdict.checks if check.pack == "tools"}
    assert tools == {"dppl_relative", "dmean_prob", *MEASURED}
    labels = {check.label for check in verdict.checks}
    assert labels > {"dloop_rate@generated", "dtask_recovery@quiz"}


@pytest.mark.parametrize("name", GENERATED)
def test_without_generation_nothing_passes(name: str) -> None:
    verdict = judged()
    assert (verdict.status, verdict.plain) == ("INCONCLUSIVE", "FAIL")
    assert f"{name}@generated" in verdict.missing
    some = written()
    without = Changes(some.rows, {k: v for k, v in some.estimates.items() if k != name})
    verdict = judged(generated=without)
    assert (verdict.status, verdict.missing) == ("INCONCLUSIVE", (f"{name}@generated",))
    assert verdict.failed_checks == verdict.undecided_checks == ()


def test_without_likeliest_tokens_nothing_passes() -> None:
    verdict = judged(generated=written(), known={})
    assert verdict.status == "INCONCLUSIVE"
    assert set(verdict.missing) == {f"{n}@{pack}/{s}" for n in MEASURED for pack, s in KEYS}


@pytest.mark.parametrize("name", MEASURED)
def test_one_pack_alone_fails_it(name: str) -> None:
    verdict = judged({("tools", 2048): {name: 1.5}}, generated=written())
    assert (verdict.status, verdict.failed_checks) == ("FAIL", (f"{name}@tools/2048",))
    # and a failure is one though something else was not measured
    assert judged({("tools", 2048): {name: 1.5}}).status == "FAIL"


@pytest.mark.parametrize("name", GENERATED)
def test_a_change_of_what_is_written_fails_it(name: str) -> None:
    for change in (0.1, -0.1):
        verdict = judged(generated=written(**{name: change}))
        assert (verdict.status, verdict.failed_checks) == ("FAIL", (f"{name}@generated",))


def test_every_task_counts_and_none_is_not_measured() -> None:
    verdict = judged(generated=written(), recovery={"quiz": 0.0, "sums": -0.05})
    assert (verdict.status, verdict.failed_checks) == ("FAIL", ("dtask_recovery@sums",))
    verdict = judged(generated=written(), recovery={})
    assert (verdict.status, verdict.missing) == ("INCONCLUSIVE", ("dtask_recovery@tasks",))


def test_limits_of_v1_are_those_of_v1() -> None:
    one = yaml.safe_load((REPOSITORY / "conf/gate/near_lossless_v1.yaml").read_text())
    two = v2().model_dump()
    assert {k: two[k] for k in one if k not in ("name", "seq_lens")} == {
        k: v for k, v in one.items() if k not in ("name", "seq_lens")
    }


def test_what_tokens_alone_can_hold_passes_without_any_writing_or_task() -> None:
    values: dict[EvalKey, dict[str, float]] = {key: dict(MEASURED) for key in KEYS}
    base: dict[EvalKey, PackReport] = {key: report(rows=ROWS) for key in KEYS}
    other = {key: report(rows=ROWS, further=values[key]) for key in KEYS}
    changes = {key: estimates(**values[key]) for key in KEYS}
    assert gate(v2(), base, other, changes, (), {}).missing
    verdict = gate(v2().of_tokens, base, other, changes, (), {})
    assert (verdict.status, verdict.missing) == ("PASS", ())
