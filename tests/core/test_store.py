"""A stage runs once per key; what is stored reads back bit for bit or is made again."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier as BarrierType
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eaft_prune.core.step import Step
from eaft_prune.core.store import Store, Stored, load, save
from eaft_prune.core.types import Blocks, ExpertScores, KeepPlan, TokenScores, Trace


@dataclass(frozen=True)
class Inner:
    values: np.ndarray[Any, Any]
    name: str


@dataclass(frozen=True)
class Value:
    """Arrays, plain values, a nested dataclass."""

    array: np.ndarray[Any, Any]
    number: float
    inner: Inner


def value(seed: int = 0) -> Value:
    rng = np.random.default_rng(seed)
    return Value(rng.random((3, 4)), float(rng.random()), Inner(rng.integers(0, 9, 5), "x"))


@dataclass
class Stage:
    """A stage that counts how often it computes."""

    store: Store
    calls: int = 0
    made: Callable[[], Value] = value

    def run(self, **changes: Any) -> Stored[Value]:
        return self.store.run(self.step(**changes))

    def holds(self, **changes: Any) -> bool:
        return self.store.holds(self.step(**changes))

    def step(self, **changes: Any) -> Step[Value]:
        arguments = {
            "name": "square",
            "version": 1,
            "settings": {"a": 1, "b": [1.5, None]},
            "inputs": {"x": "0" * 64},
            **changes,
        }
        return Step(kind=Value, compute=self._compute, **arguments)

    def _compute(self) -> Value:
        self.calls += 1
        return self.made()


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(Store(tmp_path / "store"))


def bits(item: Any) -> Any:
    """Everything a value is made of, arrays as dtype, shape and bytes."""
    if isinstance(item, np.ndarray):
        return (item.dtype.str, item.shape, np.ascontiguousarray(item).tobytes())
    if dataclasses.is_dataclass(item):
        fields = dataclasses.fields(item)
        return (type(item), *((f.name, bits(getattr(item, f.name))) for f in fields))
    if isinstance(item, tuple):
        return ("tuple", *(bits(part) for part in item))
    if isinstance(item, dict):
        return {key: bits(part) for key, part in item.items()}
    return (type(item), repr(item))


def test_a_second_run_computes_nothing_and_gives_the_same(stage: Stage) -> None:
    first = stage.run()
    second = stage.run(settings={"b": [1.5, None], "a": 1})  # key order is no setting
    assert stage.calls == 1
    assert (first.record.cached, second.record.cached) == (False, True)
    assert bits(first.value) == bits(second.value) == bits(value())
    assert first.digest == second.digest
    assert first.record.key == second.record.key
    assert first.record.path == second.record.path
    assert first.record.seconds == second.record.seconds > 0


def test_a_store_holds_what_ran(stage: Stage) -> None:
    assert not stage.holds()
    stored = stage.run()
    assert stage.holds()
    assert stage.holds(name="square/named")
    assert not stage.holds(version=2)
    path = stored.record.path / "values.json"
    text = path.read_text()
    path.write_text(text[:-1])
    assert not stage.holds()  # it would be made again
    path.write_text(text)
    assert stage.holds()
    shutil.rmtree(stored.record.path)
    assert not stage.holds()


def test_a_new_process_finds_it(stage: Stage) -> None:
    stage.run()
    again = Stage(Store(stage.store.root))
    assert bits(again.run().value) == bits(value())
    assert again.calls == 0


@pytest.mark.parametrize(
    "change",
    [
        {"name": "cube"},
        {"version": 2},
        {"settings": {"a": 2, "b": [1.5, None]}},
        {"settings": {"a": 1, "b": [1.5]}},
        {"settings": {"a": 1, "b": [1.5, None], "c": None}},
        {"settings": {}},
        {"inputs": {"x": "1" * 64}},
        {"inputs": {"y": "0" * 64}},
        {"inputs": {"x": "0" * 64, "y": "0" * 64}},
        {"inputs": {}},
    ],
    ids=str,
)
def test_any_other_identity_is_another_key(stage: Stage, change: dict[str, Any]) -> None:
    first = stage.run()
    other = stage.run(**change)
    assert stage.calls == 2
    assert other.record.key != first.record.key
    assert not other.record.cached


def test_names_of_one_stage_share_a_key(stage: Stage) -> None:
    """`evaluate/base/UNION` and `evaluate/pruned/UNION` are the same work if their inputs are."""
    first = stage.run(name="square/base")
    second = stage.run(name="square/pruned")
    assert stage.calls == 1
    assert first.record.key == second.record.key
    assert second.record.stage == "square/pruned"


def test_output_digest_tells_outputs_apart_and_nothing_else(tmp_path: Path) -> None:
    def output(root: str, seed: int, version: int) -> str:
        stage = Stage(Store(tmp_path / root), made=lambda: value(seed))
        return stage.run(version=version).digest

    assert output("a", 0, 1) == output("b", 0, 1) == output("c", 0, 2)
    assert output("d", 1, 1) != output("a", 0, 1)


def test_an_exception_leaves_nothing(stage: Stage) -> None:
    def broken() -> Value:
        raise RuntimeError("no")

    stage.made = broken
    with pytest.raises(RuntimeError, match="no"):
        stage.run()
    assert [p for p in stage.store.root.rglob("*") if p.suffix != ".lock" and p.is_file()] == []
    assert [p.name for p in stage.store.root.glob("*/*") if p.is_dir()] == []
    stage.made = value
    assert not stage.run().record.cached
    assert stage.calls == 2


def test_a_value_that_cannot_be_saved_leaves_nothing(stage: Stage) -> None:
    stage.made = lambda: dataclasses.replace(value(), number=float("nan"))
    with pytest.raises(TypeError, match="nan"):
        stage.run()
    assert [p.name for p in stage.store.root.glob("*/*") if p.is_dir()] == []


def test_facts_are_kept_in_the_record(stage: Stage) -> None:
    facts = {"tokens": 3, "rates": {"per_s": 1.5}}
    first = stage.run(facts=lambda made, seconds: {"tokens": len(made.array), "rates": {
        "per_s": 1.5}})  # fmt: skip
    assert first.record.facts == stage.run().record.facts == facts


def files_of(stored: Stored[Value]) -> list[str]:
    return sorted(item.name for item in stored.record.path.iterdir())


def test_a_stored_value_is_arrays_values_and_record(stage: Stage) -> None:
    assert files_of(stage.run()) == ["arrays.safetensors", "record.json", "values.json"]


@pytest.mark.parametrize("name", ["arrays.safetensors", "record.json", "values.json"])
@pytest.mark.parametrize("damage", ["truncated", "emptied", "removed", "altered"])
def test_a_damaged_output_is_made_again(stage: Stage, name: str, damage: str) -> None:
    path = stage.run().record.path / name
    data = path.read_bytes()
    if damage == "removed":
        path.unlink()
    elif damage == "altered":
        # of the record, an altered checksum; of the others, the last byte that carries a value
        at = data.index(b'"files"') + 40 if name == "record.json" else len(data) - 2
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    else:
        path.write_bytes(data[: len(data) // 2] if damage == "truncated" else b"")
    again = stage.run()
    assert stage.calls == 2
    assert not again.record.cached
    assert bits(again.value) == bits(value())
    assert stage.run().record.cached


def test_no_altered_byte_of_a_record_is_believed(stage: Stage) -> None:
    """Times and facts are shown and tracked: they must be what was written, too."""
    rng = np.random.default_rng(0)
    path = stage.run(facts=lambda made, seconds: {"tokens": 12345}).record.path / "record.json"
    before = path.read_bytes()
    for at in range(len(before)):
        after = bytearray(before)
        after[at] ^= 1 << int(rng.integers(7))
        path.write_bytes(after)
        with contextlib.suppress(ValueError):
            if json.loads(after) == json.loads(before):  # white space is nobody's fact
                continue
        assert not stage.holds(), at
    path.write_bytes(before)
    assert stage.holds()


@pytest.mark.parametrize(
    "text", ["[]", "null", "1", '{"files": []}', '{"files": null}', "{}", '{"files": {}}']
)
def test_a_record_of_another_shape_is_damage_too(stage: Stage, text: str) -> None:
    path = stage.run().record.path / "record.json"
    path.write_text(text)
    assert bits(stage.run().value) == bits(value())
    assert stage.calls == 2


def test_a_dead_runs_draft_is_harmless(stage: Stage) -> None:
    home = stage.run().record.path
    shutil.copytree(home, home.with_name(home.name + ".draft"))
    (home.with_name(home.name + ".draft") / "arrays.safetensors").write_bytes(b"half")
    shutil.rmtree(home)
    again = stage.run()
    assert stage.calls == 2
    assert files_of(again) == ["arrays.safetensors", "record.json", "values.json"]
    assert bits(again.value) == bits(value())
    assert not home.with_name(home.name + ".draft").exists()


def test_a_moved_store_still_answers(stage: Stage, tmp_path: Path) -> None:
    stage.run()
    stage.store.root.rename(tmp_path / "moved")
    moved = Stage(Store(tmp_path / "moved"))
    assert bits(moved.run().value) == bits(value())
    assert moved.calls == 0


FLOAT32 = st.floats(width=32, allow_nan=False, allow_infinity=False)


def floats(n: int, draw: Callable[[Any], Any]) -> np.ndarray[Any, Any]:
    return np.array(draw(st.lists(FLOAT32, min_size=n, max_size=n)), np.float32)


def token_scores(t: int, draw: Callable[[Any], Any]) -> TokenScores:
    return TokenScores(floats(t, draw), floats(t, draw), np.arange(t, dtype=np.int32))


@st.composite
def stage_values(draw: Callable[[Any], Any]) -> Any:
    t, layers, k, experts = (draw(st.integers(low, 4)) for low in (0, 1, 1, 1))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    packs = tuple(draw(st.lists(st.text(min_size=1), min_size=1, max_size=3)))
    blocks, seq_len = draw(st.integers(0, 3)), draw(st.integers(2, 5))
    kinds: list[Callable[[], Any]] = [
        lambda: token_scores(t, draw),
        lambda: Blocks(
            pack=packs[0],
            seq_len=seq_len,
            ids_BS=rng.integers(-9, 2**31 - 1, (blocks, seq_len)).astype(np.int32),
            scored_BS=rng.random((blocks, seq_len)) < 0.5,
            row_BS=rng.integers(-1, 9, (seq_len, blocks)).astype(np.int32).T,  # Fortran order
            row_packs=rng.integers(0, 2, 7).astype(np.int32)[::2],  # a view
            packs=packs,
            rows_digest="a" * 64,
        ),
        lambda: Trace(
            experts_TLK=rng.integers(0, 9, (t, layers, k)).astype(np.int16),
            weights_TLK=rng.random((t, layers, k), np.float32),
            norms_TLK=rng.random((t, layers, k), np.float32),
            scores=token_scores(t, draw),
            pack_T=np.zeros(t, np.int32),
            row_T=np.arange(t, dtype=np.int32),
            packs=packs,
            n_experts=experts,
        ),
        lambda: ExpertScores(
            score_LE=rng.normal(size=(layers, experts)),
            positive_mass_LE=rng.random((layers, experts)),
            count_LE=rng.integers(0, 2**60, (layers, experts)),
            region_tokens={"good": 2**40, "uncertain": 0, "conflict": 1},
            pack_mass_PLE=rng.random((len(packs), layers, experts)),
        ),
        lambda: KeepPlan(((0, 2), (1,)), 3),
    ]
    return draw(st.sampled_from(kinds))()


@given(stage_values())
def test_every_stage_value_round_trips_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, made: Any
) -> None:
    directory = tmp_path_factory.mktemp("value")
    save(directory, made)
    assert bits(load(directory, type(made))) == bits(made)


def test_special_floats_in_arrays_round_trip(tmp_path: Path) -> None:
    odd = np.array([-0.0, np.inf, -np.inf, np.nan, 5e-324])
    save(tmp_path, Inner(odd, "odd"))
    assert bits(load(tmp_path, Inner)) == bits(Inner(odd, "odd"))


def _race(root: Path, start: BarrierType, computed: Any, answers: Any) -> None:
    def compute() -> Value:
        with computed.get_lock():
            computed.value += 1
        return value()

    start.wait()
    stored = Store(root).run(Step("race", 1, {}, {}, Value, compute))
    answers.put((stored.digest, stored.record.cached, stored.value.number))


@pytest.mark.process
def test_processes_that_race_for_a_key_compute_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    start, computed, answers = context.Barrier(2), context.Value("i", 0), context.Queue()
    workers = [
        context.Process(target=_race, args=(tmp_path, start, computed, answers)) for _ in range(2)
    ]
    for worker in workers:
        worker.start()
    got = [answers.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert computed.value == 1
    assert sorted(cached for _, cached, _ in got) == [False, True]
    assert len({(sha, number) for sha, _, number in got}) == 1


def _killed(root: Path) -> None:
    import os
    import signal

    from eaft_prune.core import store

    def die(path: Path) -> None:  # all files are written, none synced, nothing renamed
        os.kill(os.getpid(), signal.SIGKILL)

    store.sync = die
    Store(root).run(Step("square", 1, {}, {}, Value, value))


@pytest.mark.process
def test_a_run_killed_before_the_rename_resumes(tmp_path: Path) -> None:
    worker = multiprocessing.get_context("spawn").Process(target=_killed, args=(tmp_path,))
    worker.start()
    worker.join()
    assert worker.exitcode == -9
    assert len(list(tmp_path.rglob("*.draft"))) == 1
    stage = Stage(Store(tmp_path))
    assert bits(stage.run(settings={}, inputs={}).value) == bits(value())
    assert stage.calls == 1
    assert list(tmp_path.rglob("*.draft")) == []


def test_the_record_says_what_the_value_was_made_from(stage: Stage) -> None:
    identity = json.loads((stage.run().record.path / "record.json").read_text())["identity"]
    assert identity == {
        "stage": "square",
        "version": 1,
        "settings": {"a": 1, "b": [1.5, None]},
        "inputs": {"x": "0" * 64},
    }
