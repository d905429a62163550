"""The metric of docs/examples is in intervals, gate, reports and MLflow without a line of ours."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient
from support.gates import intervals, v1
from support.pairs import pair
from support.runs import REPOSITORY, Done, World

from eaft_prune.config import GateSettings
from eaft_prune.core.types import EvalKey, Evaluation, TokenScores
from eaft_prune.core.verdict import Comparison
from eaft_prune.maths.metrics import METRICS, Metric, metric_at, pack_report
from eaft_prune.records.result import reports_by_name
from eaft_prune.report import comparison_table, html_report, markdown_report
from eaft_prune.stages.gate import gate

pytest_plugins = ("support.worlds",)

EXAMPLES = REPOSITORY / "docs/examples"
KEY: EvalKey = ("UNION", 1024)


@pytest.fixture(autouse=True)
def _beside_the_example(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))


def asked(limit: float = 0.01, **more: object) -> GateSettings:
    return v1(metrics={"metric:LOW_P": limit}, seq_lens=(1024,), **more)


def share(scores: TokenScores) -> float:
    return sum(math.exp(x) < 0.01 for x in scores.logp_T.tolist()) / len(scores)


def compared(settings: GateSettings) -> Comparison:
    sides = pair(1, blocks=400, tokens=20, damage=1.0)
    base, other = (
        Evaluation(name, name, None, {KEY: scores}, {KEY: scores.block_T}, {KEY: "blocks"}, {})
        for name, scores in zip(("base", "other"), sides, strict=True)
    )
    reports = {
        name: {KEY: pack_report(scores, sides[0], 0.15, settings.measured)}
        for name, scores in zip(("base", "other"), sides, strict=True)
    }
    change = intervals(*sides, 0.15, settings)
    assert change is not None
    verdict = gate(settings, reports["base"], reports["other"], {KEY: change})
    return Comparison(base, (other,), reports, {"other": verdict}, {"other": {KEY: change}})


def test_the_example_is_about_ten_lines() -> None:
    lines = (EXAMPLES / "metric.py").read_text().splitlines()
    assert len([line for line in lines if line.strip()]) <= 12


def test_its_change_and_error_are_those_of_a_mean_over_rows() -> None:
    base, other = pair(3, blocks=9, tokens=120, damage=1.0)
    found = intervals(base, other, 0.3, asked())
    assert found is not None
    change = found["dlow_p"]
    assert change.value == pytest.approx(share(other) - share(base))
    assert change.value > 0
    low = [(np.exp(s.logp_T.astype(float)) < 0.01).astype(float) for s in (base, other)]
    rest = low[1] - low[0] - change.value
    by_row = [rest[base.block_T == row].sum() for row in range(9)]
    error = math.sqrt(9 / 8 * sum(x**2 for x in by_row)) / len(base)
    assert change.error == pytest.approx(error)
    assert change.error > 0


@pytest.mark.parametrize(("limit", "outcome"), [(1.0, "PASS"), (1e-6, "FAIL")])
def test_its_limit_is_a_check_of_the_gate(limit: float, outcome: str) -> None:
    comparison = compared(asked(limit))
    base, other = (
        evaluation.scores[KEY] for evaluation in (comparison.base, *comparison.candidates)
    )
    check = comparison.verdicts["other"].checks[-1]
    assert (check.label, check.limit, check.outcome) == ("dlow_p@UNION/1024", limit, outcome)
    assert check.value == pytest.approx(share(other) - share(base))
    assert check.estimate == pytest.approx(check.value)


def test_every_report_and_the_files_show_it() -> None:
    settings = asked()
    comparison, metrics = compared(settings), settings.measured
    value = comparison.reports["other"][KEY]["low_p"]
    assert value == pytest.approx(share(comparison.candidates[0].scores[KEY]))
    table = comparison_table(comparison, metrics, width=120)
    markdown = markdown_report(comparison, None, {}, metrics=metrics)
    page = html_report(comparison, None, {}, metrics=metrics)
    for text in (table, markdown, page):
        assert f"{value:.4f}" in text
    assert "Δ p < 1%" in table
    assert "Share of tokens that the model gave less than 1%. Lower is better." in markdown
    assert "Δ p &lt; 1%" in page
    reports, changes = reports_by_name(comparison.reports), reports_by_name(comparison.changes)
    assert reports["other"]["UNION"]["1024"]["low_p"] == value
    assert {"value", "error", "low", "high"} < set(changes["other"]["UNION"]["1024"]["dlow_p"])


def test_a_pack_may_have_a_limit_of_its_own_and_ours_may_get_one() -> None:
    settings = v1(
        metrics={"mean_entropy": 0.02}, packs={"tools": {"metrics": {"metric:LOW_P": 0.5}}}
    )
    assert settings.measured[-1].name == "low_p"
    named = {m.name: m for m in settings.measured}
    union, tools = settings.limits(["UNION", "tools"]).values()
    assert [limits.of(named["mean_entropy"])[0] for limits in (union, tools)] == [0.02, None]
    assert [limits.of(named["low_p"])[0] for limits in (union, tools)] == [None, 0.5]
    assert union.of(named["ppl"]) == (0.25, 0.05)


def test_settings_without_metrics_of_the_users_are_written_as_before() -> None:
    assert "metrics" not in v1().model_dump()
    assert v1(metrics={"mean_entropy": 0.02}).model_dump()["metrics"] == {"mean_entropy": 0.02}


BAD = {
    "no such name": ("lowp", ["'lowp'", "cc_rate", "module:name"]),
    "no such module": ("nowhere:LOW_P", ["nowhere", "ModuleNotFoundError"]),
    "not in the module": ("metric:HIGH_P", ["HIGH_P", "AttributeError"]),
    "not a metric": ("math:pi", ["math:pi", "float"]),
    "has a key": ("cc_rate", ["cc_rate", "max_dcc_rate"]),
}


@pytest.mark.parametrize(("place", "said"), BAD.values(), ids=BAD)
def test_what_is_no_metric_is_refused_before_anything_runs(place: str, said: list[str]) -> None:
    with pytest.raises(ValueError, match=r"gate\.metrics") as error:
        v1(metrics={place: 0.01})
    for word in said:
        assert word in str(error.value)


def test_two_metrics_of_one_name_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    text = (EXAMPLES / "metric.py").read_text()
    (tmp_path / "again.py").write_text(text)
    (tmp_path / "taken.py").write_text(re.sub('"low_p"', '"blocks"', text))
    with pytest.raises(ValueError, match="low_p is there already"):
        v1(metrics={"metric:LOW_P": 0.1, "again:LOW_P": 0.1})
    with pytest.raises(ValueError, match="blocks is there already"):
        v1(metrics={"taken:LOW_P": 0.1})


def test_a_metric_is_drawn_or_a_distance() -> None:
    with pytest.raises(ValueError, match="per_token, or value and influence, or distance"):
        Metric("x", "x", "Nothing.")
    for given in ({"per_token": share}, {"distance": share}):
        with pytest.raises(ValueError, match="per_token, or"):
            Metric("x", "x", "Nothing.", value=share, influence=share, **given)
    columns = [metric.name for metric in METRICS if metric.distance and metric.place == "columns"]
    assert columns == ["js2d"]
    assert metric_at("metric:LOW_P").change == "dlow_p"


def test_a_run_judges_and_tracks_it(world: World, pipeline: Done) -> None:
    done = world.run("eval.packs=[UNION]", "gate.metrics={metric\\:LOW_P: 0.01}")
    assert done.code == 0, done.out + done.err
    check = done.result["gate"]["checks"][-1]
    assert (check["name"], check["limit"]) == ("dlow_p", 0.01)
    where = str(check["seq_len"])
    figures = (
        MlflowClient(tracking_uri=world.uri).get_run(done.result["mlflow_run_id"]).data.metrics
    )
    assert figures[f"verdict/dlow_p/UNION/{where}/value"] == check["value"]
    report = done.result["reports"]["pruned"]["UNION"][where]
    assert figures[f"tables/UNION/{where}/low_p"] == report["low_p"]
    assert "Δ p < 1%" in done.out
