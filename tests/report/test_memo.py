"""The memo says what the runs say: who passes, who fails first, and on what evidence."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from eaft_prune.core.outcome import RunSummary
from eaft_prune.report.evidence import Run
from eaft_prune.report.memo import decision_memo, recommendation

LIMITS = {"dppl": 0.25, "dcc_rate": 0.002, "dmean_prob": 0.02, "js2d": 0.02}


def run(
    keep_n: int,
    status: str = "PASS",
    name: str = "eaft_reap",
    seed: str = "1",
    task: str = "pipeline",
    values: dict[str, float] | None = None,
    **params: str,
) -> RunSummary:
    """A finished run whose checks use a tenth of their limits, but for `values`."""
    metrics = {}
    for check, limit in LIMITS.items():
        where = f"verdict/{check}/UNION/1024"
        metrics[f"{where}/limit"] = limit
        metrics[f"{where}/value"] = (values or {}).get(check, limit / 10)
    metrics |= {"tables/UNION/1024/dppl_percent": 1, "tables/tools/2048/dppl_percent": 25}
    metrics |= {"telemetry/tokens_per_s/profile": 1500.0, "telemetry/memory/peak_rss_bytes": 2e9}
    metrics |= {"telemetry/tokens_per_s/evaluate": 2048.0}
    return RunSummary(
        run_id=f"{keep_n:08d}",
        name=f"keep{keep_n}",
        status="FINISHED",
        active=True,
        started=0.0,
        ended=86400.0,
        params={
            "model.name": "small",
            "pruning.name": name,
            "pruning.keep_n": str(keep_n),
            "pruning.quantile": "0.15",
            "profile.num_blocks": "64",
            "eval.candidates": '["pruned"]',
            "eval.seed": seed,
            "eval.name": "bigblocks",
            "gate.seq_lens": "[1024]",
            "gate.name": "near_lossless_v1",
            **params,
        },
        tags={"task": task, "gate.status": status, "checkpoint.base.digest": "ab" * 32},
        metrics=metrics,
    )


def memo(*runs: RunSummary) -> str:
    return decision_memo(runs, {"experiment": "tests"}, ["pipeline"], ["noise_floor", "noop"])


def row(text: str, *starts: str) -> list[str]:
    """The cells of the one table row that begins with these."""
    lines = [[c.strip() for c in ln.split("|")[1:-1]] for ln in text.splitlines() if ln[:1] == "|"]
    (found,) = (cells for cells in lines if tuple(cells[: len(starts)]) == starts)
    return found


def test_a_check_is_read_as_it_was_decided() -> None:
    """By its estimate where one was made, whatever the plain number."""
    kept = run(24, values={"js2d": 0.1003})
    estimates = {"verdict/js2d/UNION/1024/estimate": 0.0017}
    decided = replace(kept, metrics={**kept.metrics, **estimates})
    (check,) = (check for check in Run(decided).checks() if check.name == "js2d")
    assert check.value == 0.0017
    assert check.usage < 0.1
    assert Run(kept).checks()[0].value == 0.1003


def test_the_smallest_keep_n_whose_every_run_passes() -> None:
    text = memo(
        run(28),
        run(24, seed="1"),
        run(24, seed="2"),
        run(20, seed="1"),
        run(20, "FAIL", seed="2", values={"js2d": 0.03, "dppl": -0.3}),
    )
    assert "**Recommendation: keep_n = 24** with eaft\\_reap: 2 runs, all PASS" in text
    assert "seed 1, 2 at bigblocks 1024" in text
    assert row(text, "eaft\\_reap", "20")[2:4] == ["**FAIL**", "2 runs"]
    assert row(text, "eaft\\_reap", "24")[2:4] == ["**PASS**", "2 runs"]
    assert row(text, "eaft\\_reap", "24")[6] == "tools/2048 +25.0%"


def repeated(one: RunSummary, run_id: str, evaluations: str) -> RunSummary:
    """The same settings in another run, with these keys of evaluations."""
    keys = {f"stage.evaluate/pruned/UNION/{i}": key for i, key in enumerate(evaluations)}
    return replace(one, run_id=run_id, tags={**one.tags, "plan.digest": "p", **keys})


def test_a_run_repeated_from_the_store_is_one_result() -> None:
    same = [repeated(run(24), str(i), "ab") for i in range(5)]
    other = repeated(run(24), "6", "ac")
    text = memo(*same)
    assert "1 result, 5 runs, all PASS" in text
    assert row(text, "eaft\\_reap", "24")[3] == "1 result, 5 runs"
    assert "which are 1 distinct results" in text
    assert row(memo(*same, other), "eaft\\_reap", "24")[3] == "2 results, 6 runs"
    judged_otherwise = repeated(run(24, **{"gate.max_dppl": "9"}), "7", "ab")
    assert row(memo(*same, judged_otherwise), "eaft\\_reap", "24")[3] == "2 results, 6 runs"


def test_a_failure_repeated_from_the_store_is_told_once() -> None:
    text = memo(*(repeated(run(20, "FAIL", values={"js2d": 0.5}), str(i), "ab") for i in range(5)))
    assert text.count("JS2D UNION@1024: +0.5000") == 2  # in the table, and as what fails first
    assert "5 runs: JS2D" in text


def test_what_failed_first_is_the_largest_keep_n_that_fails_worst_check_first() -> None:
    text = memo(
        run(24),
        run(20, "FAIL", values={"js2d": 0.03, "dppl": -0.3}),
        run(16, "FAIL", values={"js2d": 0.5}),
    )
    at = text.index("What fails first")
    first = text[at : text.index("## Throughput", at)]
    assert "keep_n = 20" in first
    assert "keep_n = 16" not in first
    assert first.index("JS2D UNION@1024: +0.0300, limit 0.0200, margin -0.0100") < first.index(
        "PPL UNION@1024: -0.3000, limit 0.2500, margin -0.0500"
    )


def test_undecided_is_not_passed() -> None:
    text = memo(run(24), run(20, "INCONCLUSIVE"))
    assert "keep_n = 24**" in text
    assert row(text, "eaft\\_reap", "20")[2] == "**INCONCLUSIVE**"


def test_criteria_and_settings_are_judged_apart() -> None:
    """One method's failure at 20 says nothing of another's success there."""
    text = memo(
        run(20, "FAIL"),
        run(20, **{"pruning.quantile": "0.3"}),
        run(24, name="reap"),
    )
    assert "**Recommendation: keep_n = 20** with eaft\\_reap quantile=0.3" in text
    assert row(text, "eaft\\_reap quantile=0.15", "20")[2] == "**FAIL**"
    assert row(text, "reap", "24")[2] == "**PASS**"


def test_a_masked_pass_asks_for_the_checkpoint() -> None:
    masked = run(20, **{"eval.candidates": '["masked", "pruned"]'})
    assert "export it" in memo(masked)
    assert "export it" not in memo(run(20))


def test_controls_and_costs() -> None:
    text = memo(run(32, task="noise_floor"), run(24))
    assert row(text, "noise\\_floor", "small")[2] == "**PASS**"
    assert "2 finished runs, 1 of them with a verdict" in text
    assert row(text, "keep24")[2:] == ["1970-01-02 00:00", "1,500", "2,048", "2.00", ""]


def test_nothing_to_decide() -> None:
    assert "there is nothing to decide" in memo()


def test_names_cannot_break_the_page() -> None:
    text = memo(run(24, name="a|b<c>*d*"))
    assert "a\\|b\\<c\\>\\*d\\*" in text


STATUSES = st.sampled_from(["PASS", "FAIL", "INCONCLUSIVE"])
RUNS = st.lists(
    st.tuples(st.sampled_from([8, 16, 20, 24]), STATUSES, st.sampled_from(["a", "b"])), max_size=12
)


@given(RUNS)
def test_the_recommendation_is_the_naive_one(drawn: list[tuple[int, str, str]]) -> None:
    best = None
    for keep_n in (24, 20, 16, 8):
        for name in ("a", "b"):
            of_it = [status for k, status, n in drawn if (k, n) == (keep_n, name)]
            if of_it and all(status == "PASS" for status in of_it):
                best = keep_n
    found = recommendation([Run(run(k, status, name)) for k, status, name in drawn])
    assert (found[0] if found else None) == best
