"""Saved evaluations read back as they were, and only like is compared with like."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eaft_prune.config import EvalSettings, GateSettings
from eaft_prune.core.types import EvalKey, Evaluation, TokenScores, UserError
from eaft_prune.maths.metrics import pack_report
from eaft_prune.pipeline.compare import compare
from eaft_prune.records.evaluation import load_evaluation, save_evaluation

KEYS: tuple[EvalKey, ...] = (("a", 64), ("a", 128), ("UNION", 64), ("UNION", 128))
EVAL = EvalSettings(name="t", seq_lens=(64, 128), num_blocks=4, seed=0)
GATE = GateSettings(
    name="g", seq_lens=(64, 128), max_dppl=0.25, max_dppl_relative=0.05, max_dcc_rate=0.002,
    max_dmean_prob=0.02, max_js2d=0.02,
)  # fmt: skip


def token_scores(seed: int, tokens: int = 200) -> TokenScores:
    rng = np.random.default_rng(seed)
    return TokenScores(
        np.log(rng.uniform(0.01, 1, tokens)).astype(np.float32),
        rng.random(tokens).astype(np.float32),
        (np.arange(tokens) // 50).astype(np.int32),
    )


def evaluation(model: str = "base", seed: int = 0, **changes: Any) -> Evaluation:
    values: dict[str, Any] = {
        "model": model,
        "checkpoint_digest": "c" * 64,
        "plan_digest": None,
        "scores": {key: token_scores(seed + i) for i, key in enumerate(KEYS)},
        "rows": {key: np.arange(200, dtype=np.int32) // 20 for key in KEYS},
        "token_digests": {key: str(i) * 64 for i, key in enumerate(KEYS)},
        "conditions": {"engine": "transformers", "dtype": "float32", "top_k": 4},
    }
    return Evaluation(**{**values, **changes})


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    directory = tmp_path / "saved"
    save_evaluation(directory, evaluation())
    return directory


@pytest.mark.parametrize("plan_digest", [None, "p" * 64])
def test_an_evaluation_reads_back_as_it_was(tmp_path: Path, plan_digest: str | None) -> None:
    made = evaluation("pruned", 7, plan_digest=plan_digest)
    save_evaluation(tmp_path / "e", made)
    read = load_evaluation(tmp_path / "e")
    for name in ("model", "checkpoint_digest", "plan_digest", "token_digests", "conditions"):
        assert getattr(read, name) == getattr(made, name), name
    assert list(read) == list(KEYS)
    for key in KEYS:
        assert read.rows[key].tolist() == made.rows[key].tolist()
        for name in ("logp_T", "entropy_T", "block_T"):
            ours, theirs = getattr(read.scores[key], name), getattr(made.scores[key], name)
            assert (ours.dtype, ours.tobytes()) == (theirs.dtype, theirs.tobytes())


def test_a_loaded_evaluation_compares_like_the_one_that_was_saved(tmp_path: Path) -> None:
    base, other = evaluation(), evaluation("pruned", 9)
    read = []
    for made in (base, other):
        save_evaluation(tmp_path / made.model, made)
        read.append(load_evaluation(tmp_path / made.model))
    fresh, again = compare(EVAL, GATE, base, [other]), compare(EVAL, GATE, read[0], [read[1]])
    assert again.reports == fresh.reports
    assert again.verdicts == fresh.verdicts
    # a fresh one and a saved one are comparable too
    assert compare(EVAL, GATE, base, [read[1]]).reports == fresh.reports


def test_reports_are_against_the_base_and_verdicts_for_candidates() -> None:
    base, same, other = evaluation(), evaluation("same"), evaluation("other", 50)
    result = compare(EVAL, GATE, base, [same, other])
    assert set(result.reports) == {"base", "same", "other"}
    assert set(result.verdicts) == {"same", "other"}
    same_verdict, other_verdict = result.verdicts["same"], result.verdicts["other"]
    assert (same_verdict.status, same_verdict.plain) == ("PASS", "PASS")
    assert (other_verdict.status, other_verdict.plain) == ("INCONCLUSIVE", "FAIL")  # of 10 rows
    plain = compare(EVAL, GATE.model_copy(update={"confidence": None}), base, [same, other])
    assert [v.status for v in plain.verdicts.values()] == ["PASS", "FAIL"]
    assert not any(plain.changes.values())
    assert set(result.changes["other"]) == set(KEYS)
    for key in KEYS:
        expected = pack_report(other.scores[key], base.scores[key], 0.15, row_T=base.rows[key])
        assert result.reports["other"][key] == expected
        assert result.reports["base"][key].js2d == result.reports["same"][key].js2d == 0
        assert result.reports["other"][key].js2d > 0


def test_one_model_alone_has_reports_and_no_verdict() -> None:
    result = compare(EVAL, GATE, evaluation(), [])
    assert set(result.reports) == {"base"}
    assert result.verdicts == {}


@pytest.mark.parametrize("key", KEYS)
def test_evaluations_of_other_tokens_are_refused(key: EvalKey) -> None:
    other = evaluation("pruned")
    digests = {**other.token_digests, key: "f" * 64}
    with pytest.raises(UserError, match=rf"{key[0]}.*{key[1]}.*same tokens"):
        compare(EVAL, GATE, evaluation(), [replace(other, token_digests=digests)])


@pytest.mark.parametrize("shorter", ["base", "pruned"])
def test_evaluations_of_other_packs_are_refused(shorter: str) -> None:
    sides = {name: evaluation(name) for name in ("base", "pruned")}
    part = {name: {k: v for k, v in getattr(sides[shorter], name).items() if k != ("a", 64)}
            for name in ("scores", "token_digests")}  # fmt: skip
    sides[shorter] = replace(sides[shorter], **part)
    with pytest.raises(UserError, match=r"a.*64"):
        compare(EVAL, GATE, sides["base"], [sides["pruned"]])


@pytest.mark.parametrize(
    "conditions",
    [
        {"engine": "sglang", "dtype": "float32", "top_k": 4},
        {"engine": "transformers", "dtype": "bfloat16", "top_k": 4},
        {"engine": "transformers", "dtype": "float32", "top_k": 2},
        {"engine": "transformers", "dtype": "float32"},
        {"engine": "transformers", "dtype": "float32", "top_k": 4, "more": 1},
    ],
    ids=str,
)
def test_evaluations_under_other_conditions_are_refused(conditions: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="like with like"):
        compare(EVAL, GATE, evaluation(), [evaluation("pruned", conditions=conditions)])


def test_every_candidate_is_checked() -> None:
    bad = evaluation("bad", conditions={})
    with pytest.raises(UserError, match="bad"):
        compare(EVAL, GATE, evaluation(), [evaluation("good"), bad])


def test_two_models_of_one_name_are_refused() -> None:
    with pytest.raises(UserError, match="base"):
        compare(EVAL, GATE, evaluation(), [evaluation()])
    with pytest.raises(UserError, match="twin"):
        compare(EVAL, GATE, evaluation(), [evaluation("twin"), evaluation("twin", 3)])


def test_the_quantile_of_the_settings_is_used() -> None:
    wide = EVAL.model_copy(update={"cc_quantile": 0.9})
    base, other = evaluation(), evaluation("pruned", 3)
    narrow = compare(EVAL, GATE, base, [other]).reports["pruned"]["a", 64].cc_rate
    assert compare(wide, GATE, base, [other]).reports["pruned"]["a", 64].cc_rate > narrow


def files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


@pytest.mark.parametrize("damage", ["removed", "emptied", "truncated"])
def test_any_damaged_file_is_one_error(saved: Path, tmp_path: Path, damage: str) -> None:
    count = len(files(saved))
    assert count == 1 + 2 * len(KEYS)
    for number in range(count):
        copy = tmp_path / f"copy{number}"
        shutil.copytree(saved, copy)
        path = files(copy)[number]
        data = path.read_bytes()
        if damage == "removed":
            path.unlink()
        else:
            path.write_bytes(data[: len(data) // 2] if damage == "truncated" else b"")
        if path.name == "values.json" and json.loads(data) == {}:
            continue_if_harmless(copy)
            continue
        with pytest.raises(UserError, match=f"copy{number}"):
            load_evaluation(copy)


def continue_if_harmless(directory: Path) -> None:
    """TokenScores have no plain values: a lost empty file may be an error, never other scores."""
    try:
        read = load_evaluation(directory)
    except UserError:
        return
    assert all(len(scores) == 200 for scores in read.scores.values())


def test_an_altered_score_is_noticed(saved: Path) -> None:
    """A saved evaluation is evidence: what its bytes say must be what was measured."""
    path = saved / "a" / "64" / "arrays.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 0x01
    path.write_bytes(data)
    with pytest.raises(UserError, match="saved"):
        load_evaluation(saved)


@pytest.mark.parametrize("gone", ["model", "checkpoint_digest", "conditions", "token_digests"])
def test_a_fact_that_is_gone_is_one_error(saved: Path, gone: str) -> None:
    path = saved / "evaluation.json"
    facts = json.loads(path.read_text())
    del facts[gone]
    path.write_text(json.dumps(facts))
    with pytest.raises(UserError, match="saved"):
        load_evaluation(saved)


def test_a_directory_that_is_no_evaluation_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"evaluation\.json"):
        load_evaluation(tmp_path)
    with pytest.raises(UserError, match="absent"):
        load_evaluation(tmp_path / "absent")
    (tmp_path / "evaluation.json").write_text("[]")
    with pytest.raises(UserError, match=r"evaluation\.json"):
        load_evaluation(tmp_path)


def test_an_evaluation_is_not_written_over_another(saved: Path) -> None:
    with pytest.raises((UserError, FileExistsError)):
        save_evaluation(saved, evaluation("other", 3))
    assert load_evaluation(saved).model == "base"


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "pipe"])
def test_an_evaluation_names_its_own_files(saved: Path, name: str) -> None:
    (saved.parent / "secret").write_text("x")
    os.mkfifo(saved / "pipe")
    path = saved / "evaluation.json"
    facts = json.loads(path.read_text())
    path.write_text(json.dumps({**facts, "files": {**facts["files"], name: "0" * 64}}))
    with pytest.raises(UserError, match=name) as caught:
        load_evaluation(saved)
    assert "\n" not in str(caught.value)


def test_a_pack_of_an_evaluation_is_a_name(saved: Path) -> None:
    path = saved / "evaluation.json"
    facts = json.loads(path.read_text())
    tokens = [["../saved/a", *rest] for _, *rest in facts["token_digests"]]
    path.write_text(json.dumps({**facts, "token_digests": tokens}))
    with pytest.raises(UserError, match="no name of a pack"):
        load_evaluation(saved)
