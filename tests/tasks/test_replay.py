"""run.lock.yaml says what a run was, and task=replay finds what is no longer so."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from mlflow import MlflowClient
from support.runs import Done, World, edit_shard, main, write_pack

from eaft_prune.config import Experiment, parse_experiment, runs_code
from eaft_prune.config.defaults import section_of
from eaft_prune.config.reference import rows
from eaft_prune.core.provenance import git_state
from eaft_prune.records.lock import drift

pytest_plugins = ("support.worlds",)


@pytest.fixture(scope="module")
def locked(world: World) -> Done:
    """The quick pipeline in the shared store."""
    done = world.run("+tracking.tags={source: 'https://me:secret@example.org/x'}")
    assert done.code == 0, done.out + done.err
    return done


def lock_of(done: Done) -> Path:
    (path,) = done.cwd.rglob("run.lock.yaml")
    return path


def read(path: Path) -> dict[str, Any]:
    value = yaml.safe_load(path.read_text())
    assert isinstance(value, dict)
    return value


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def replay(world: World, lock: Path, *overrides: str) -> Done:
    return world.run("task=replay", f"replay.lock={lock}", *overrides)


def fields(done: Done) -> set[str]:
    return {item["field"] for item in done.result["facts"]["drift"]}


def test_a_lock_holds_what_the_run_read_and_found(world: World, locked: Done) -> None:
    value, result = read(lock_of(locked)), locked.result
    model = value["inputs"]["model"]
    assert model["path"] == str(world.model)
    assert model["digest"] == result["base"]["digest"]
    assert model["files"] == {item.name: sha256(item) for item in world.model.iterdir()}
    packs = value["inputs"]["packs"]
    assert {name: pack["sha256"] for name, pack in packs.items()} == {
        name: sha256(path) for name, path in world.packs.items()
    }
    facts = {stage["stage"]: stage["facts"] for stage in result["stages"]}
    assert set(value["inputs"]["blocks"]) == {"eval/UNION/64", "profile/UNION/64"}
    for name, blocks in value["inputs"]["blocks"].items():
        wanted = facts[f"pack/{name}"]
        assert blocks == {"rows": wanted["rows_digest"], "tokens": wanted["token_digest"]}
    assert value["keys"] == {stage["stage"]: stage["key"] for stage in result["stages"]}
    assert value["from_store"] == [s["stage"] for s in result["stages"] if s["cached"]]
    outputs = value["outputs"]
    assert outputs["stages"] == result["digests"]
    assert outputs["plan"]["digest"] == result["plan"]["digest"]
    assert outputs["checkpoint"] == result["checkpoint"]["digest"]
    assert outputs["metrics"] == result["reports"]  # to the bit, through YAML
    assert value["device"]["threads"] == 1
    assert value["seeds"] == {
        "eval.seed": None, "profile.seed": None, "pruning.seed": 0,
        "compensation.seed": 0, "marginal.seed": 0, "generation.seeds": [],
        "harness.seed": 0,
    }  # fmt: skip
    assert set(value["code"]) >= {"version", "commit"}
    assert value["versions"]["torch"]
    client = MlflowClient(tracking_uri=world.uri)
    kept = {item.path for item in client.list_artifacts(result["mlflow_run_id"])}
    assert "run.lock.yaml" in kept


def test_a_lock_has_the_settings_and_no_password(locked: Done) -> None:
    text = lock_of(locked).read_text()
    assert "https://***@example.org/x" in text
    assert "secret" not in text
    settings = parse_experiment(read(lock_of(locked))["config"])
    assert settings.eval.seq_lens == (64,)
    assert settings.pruning.keep_n == 4


def test_a_replay_computes_everything_again_and_finds_no_drift(world: World, locked: Done) -> None:
    done = replay(world, lock_of(locked))
    assert done.code == 0, done.out + done.err
    facts = done.result["facts"]
    assert facts["drift"] == []
    assert facts["compared"] > 50
    assert not any(stage["cached"] for stage in done.result["stages"])
    assert f"no drift: all {facts['compared']} fields" in done.out
    assert read(lock_of(done))["outputs"] == read(lock_of(locked))["outputs"]
    assert not list(lock_of(done).parent.glob("replay-*"))


def test_another_row_is_named_down_to_the_metrics(
    world: World, locked: Done, tmp_path: Path
) -> None:
    texts = pq.read_table(world.packs["alpha"])["text"].to_pylist()
    texts = [text.replace("<|message|>", "<|message|>so ") for text in texts]
    changed = write_pack(tmp_path / "alpha.parquet", texts)
    done = replay(world, lock_of(locked), f"replay.set={{packs.files.alpha: {changed}}}")
    assert done.code == 3, done.out + done.err
    assert done.result["status"] == "FINISHED"
    assert {
        "config.packs.files.alpha",
        "inputs.packs.alpha.sha256",
        "inputs.blocks.eval/UNION/64.rows",
        "inputs.blocks.eval/UNION/64.tokens",
        "outputs.stages.evaluate/base/UNION/64",
        "outputs.metrics.base.UNION.64.ppl",
    } <= fields(done)
    assert not any(name.startswith(("inputs.model", "inputs.packs.beta")) for name in fields(done))
    before, now = (read(lock_of(item))["outputs"]["metrics"] for item in (locked, done))
    ppl = [value["base"]["UNION"]["64"]["ppl"] for value in (before, now)]
    (item,) = (
        item
        for item in done.result["facts"]["drift"]
        if item["field"] == "outputs.metrics.base.UNION.64.ppl"
    )
    assert item["difference"] == abs(ppl[1] - ppl[0]) > 0


def test_another_weight_is_named_by_its_file(world: World, locked: Done, tmp_path: Path) -> None:
    place = world.copied(tmp_path)

    def flip(weights: dict[str, np.ndarray[Any, Any]]) -> None:
        weights["lm_head.weight"][12, 3] += 0.5

    shard = edit_shard(place.model, "lm_head.weight", flip).name
    done = replay(world, lock_of(locked), f"replay.set={{model.path: {place.model}}}")
    assert done.code == 3, done.out + done.err
    files = {name for name in fields(done) if name.startswith("inputs.model.files.")}
    assert files == {f"inputs.model.files.{shard}"}
    assert "outputs.metrics.base.UNION.64.ppl" in fields(done)
    assert not any(name.startswith(("inputs.packs", "inputs.blocks")) for name in fields(done))


def test_what_replay_cannot_find_it_names(world: World, locked: Done, tmp_path: Path) -> None:
    lock = lock_of(locked)
    for change, said in (
        (f"{{model.path: {tmp_path}/gone}}", f"{tmp_path}/gone"),
        (f"{{packs.files.beta: {tmp_path}/gone.parquet}}", "packs.files.beta"),
        ("{pruning.keepn: 4}", "did you mean pruning.keep_n?"),
    ):
        error = replay(world, lock, f"replay.set={change}").failed()
        assert said in error
        assert "replay.set=" in error or "unknown setting" in error


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "cannot be read"),
        ("a: [", "is not YAML"),
        ("- 1", "is no run.lock.yaml"),
        ("format: 9", "of format 1"),
        ("format: 1\nconfig: {}", "lacks inputs"),
    ],
)
def test_what_is_no_lock_is_refused(
    world: World, tmp_path: Path, text: str | None, said: str
) -> None:
    lock = tmp_path / "run.lock.yaml"
    if text is not None:
        lock.write_text(text)
    assert said in replay(world, lock).failed()


def test_points_of_a_multirun_have_their_own_locks(world: World) -> None:
    done = world.run("task=profile", "-m", "pruning.keep_n=4,8")
    assert done.code == 0, done.out + done.err
    locks = sorted(done.cwd.rglob("run.lock.yaml"))
    assert [read(lock)["config"]["pruning"]["keep_n"] for lock in locks] == [4, 8]
    again = replay(world, locks[1], "replay.fresh=false")
    assert again.code == 0, again.out + again.err
    assert fields(again) == set()


def test_a_search_is_replayed_in_a_study_of_its_own(world: World, tmp_path: Path) -> None:
    done = world.run(
        "task=search", "search.n_trials=3", "search.seq_len=64", "search.num_blocks=4",
        "search.chunk_blocks=2", f"search.storage=sqlite:///{tmp_path}/optuna.db",
    )  # fmt: skip
    assert done.code == 0, done.out + done.err
    before = (tmp_path / "optuna.db").read_bytes()
    again = replay(world, lock_of(done))
    assert again.code == 0, again.out + again.err
    assert (tmp_path / "optuna.db").read_bytes() == before
    outputs = read(lock_of(again))["outputs"]
    assert outputs["facts"]["trials_now"] == 3
    assert outputs["metrics"] == done.result["reports"]


@pytest.mark.process
def test_an_installed_package_does_not_take_the_commit_of_the_repository_it_lies_in(
    tmp_path: Path,
) -> None:
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    for name in ("mine.py", "theirs.py"):
        (tmp_path / name).write_text("")
    subprocess.run(["git", "-C", tmp_path, "add", "mine.py"], check=True)
    command = ["git", "-C", tmp_path, "-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run([*command, "commit", "-q", "-m", "one"], check=True)
    assert git_state(tmp_path / "mine.py") is not None
    assert git_state(tmp_path / "theirs.py") is None


def test_drift_is_every_field_that_differs_and_no_other() -> None:
    sections = ("config", "inputs", "code", "versions", "device", "keys", "outputs")
    one: dict[str, Any] = {name: {"a": 1, "b": {"c": 2.5}} for name in sections}
    other: dict[str, Any] = {name: {"a": 1, "b": {"c": 2.5}} for name in sections}
    assert drift(one, other) == ([], 14)
    one["config"]["tracking"] = {"uri": "here"}
    other["config"]["tracking"] = {"uri": "there"}
    other["outputs"]["b"] = {"c": 2.0, "d": True}
    other["inputs"] = {"a": "x"}
    found, compared = drift(one, other)
    assert compared == 15
    assert [(item.field, item.output, item.difference) for item in found] == [
        ("inputs.a", False, None),
        ("inputs.b.c", False, None),
        ("outputs.b.c", True, 0.5),
        ("outputs.b.d", True, None),
    ]


FOREIGN: list[tuple[str, Any]] = [
    ("engine.python", "/bin/sh"),
    ("engine.args", ["--model-path", "x"]),
    ("engine.env", {"LD_PRELOAD": "x.so"}),
    ("engine.name", "evil:E"),
    ("gate.metrics", {"evil:M": 0.1}),
    ("gate.packs", {"default": {"metrics": {"evil:M": 0.1}}}),
    ("pruning.function", "evil:f"),
    ("search", {"space": {"pruning.function": {"choices": ["evil:f"]}}}),
]


def edited(lock: Path, target: Path, setting: str, value: Any) -> Path:
    values = read(lock)
    *path, last = setting.split(".")
    section = values["config"]
    for name in path:
        section = section[name]
    section[last] = value
    target.write_text(yaml.safe_dump(values))
    return target


@pytest.mark.parametrize(("setting", "value"), FOREIGN, ids=[name for name, _ in FOREIGN])
def test_a_lock_that_runs_code_is_refused_before_it_does(
    world: World, locked: Done, tmp_path: Path, setting: str, value: Any
) -> None:
    lock = edited(lock_of(locked), tmp_path / "lock.yaml", setting, value)
    cwd = tmp_path / "cwd"
    cwd.mkdir()
    (cwd / "evil.py").write_text("open('ran', 'w')\nraise ValueError('imported')\n")
    arguments = [*world.arguments, "task=replay", f"replay.lock={lock}"]
    error = main(arguments, cwd).failed()
    assert "replay.trust=true" in error
    assert setting in error
    assert not (cwd / "ran").exists()


def test_a_trusted_lock_is_taken_at_its_word_and_what_is_typed_is_trusted(
    world: World, locked: Done, tmp_path: Path
) -> None:
    lock = edited(lock_of(locked), tmp_path / "lock.yaml", "gate.metrics", {"nowhere:M": 0.1})
    assert "No module named 'nowhere'" in replay(world, lock, "replay.trust=true").failed()
    mine = replay(world, lock, "replay.set={gate.metrics: {elsewhere\\:M: 1}}")
    assert "No module named 'elsewhere'" in mine.failed()


@pytest.mark.parametrize("task", ["gc", "doctor", "replay", "memo"])
def test_a_lock_of_a_task_that_leaves_none_is_refused(
    world: World, locked: Done, tmp_path: Path, task: str
) -> None:
    lock = edited(lock_of(locked), tmp_path / "lock.yaml", "task.name", task)
    own = {"replay": {"lock": "x", "trust": True}, "gc": {"delete": True}, "memo": {}, "doctor": {}}
    edited(lock, lock, task, own[task])
    assert f"task={task}, which leaves no lock" in replay(world, lock).failed()


def test_settings_that_take_a_module_are_known_to_run_code() -> None:
    """What the reference says takes module:name, and no list of its own."""
    named = [
        name.strip("`")
        for section, field in Experiment.model_fields.items()
        if (kind := section_of(field.annotation))
        for name, _, _, meaning in rows(kind, f"{section}.")
        if "module:" in meaning.lower()
    ]
    assert len(named) >= 3
    for name in named:
        section, key = name.split(".")
        assert any(runs_code({section: {key: value}}) for value in ("evil:x", {"evil:x": 1})), name
