"""What docs/extending.md shows runs: each example is a file of docs/examples."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from support.forks import fork
from support.runs import REPOSITORY, Done, World, fresh_directory, main

from eaft_prune.cli.main import main as command
from eaft_prune.core.store import load
from eaft_prune.core.types import ExpertScores, TokenScores, Trace

pytest_plugins = ("support.worlds",)

EXAMPLES = REPOSITORY / "docs" / "examples"


def run_with(world: World, example: str, *overrides: str, text: str | None = None) -> Done:
    """A run in a directory that holds the example under a name of its own."""
    cwd = fresh_directory(world.home)
    source = (EXAMPLES / f"{example}.py").read_text() if text is None else text
    (cwd / f"{example}_{cwd.name}.py").write_text(source)
    asked = [override.replace(f"{example}:", f"{example}_{cwd.name}:") for override in overrides]
    return main([*world.arguments, *asked], cwd)


def stage(done: Done, name: str) -> tuple[str, bool]:
    """Key of a stage, and whether it came from the store."""
    (found,) = [s for s in done.result["stages"] if s["stage"] == name]
    return found["key"], found["cached"]


CRITERION = ("task=profile", "pruning=custom", "pruning.function=criterion:gate_where_right")


def test_a_function_of_the_users_scores_the_trace(world: World) -> None:
    done = run_with(world, "criterion", *CRITERION)
    assert done.code == 0, done.err
    trace = load(world.store / "profile" / stage(done, "profile")[0], Trace)
    scores = load(world.store / "score" / stage(done, "score")[0], ExpertScores)
    naive = np.zeros((trace.n_layers, trace.n_experts))
    for t, p in enumerate(trace.scores.p_T):
        for layer in range(trace.n_layers):
            for expert, gate in zip(
                trace.experts_TLK[t, layer], trace.weights_TLK[t, layer], strict=True
            ):
                naive[layer, expert] += float(gate) if p > 0.5 else 0.0
    np.testing.assert_allclose(scores.score_LE, naive, rtol=1e-6)
    np.testing.assert_allclose(scores.pack_mass_PLE.sum(axis=0), naive, rtol=1e-6)
    kept = done.result["plan"]["kept"]
    assert kept == [sorted(np.argsort(-row, kind="stable")[:4].tolist()) for row in naive]


def test_another_source_is_another_key(world: World, tmp_path: Path) -> None:
    """A function of one name, as it was in three processes."""
    source = (EXAMPLES / "criterion.py").read_text()
    own = world.elsewhere(world.home, uri=f"sqlite:///{tmp_path}/mlruns/mlflow.db")
    found = []
    for text in (source, source, source.replace("> 0.5", "> 0.25")):
        asked = [*own.arguments, "task=profile", "pruning=custom"]
        asked.append("pruning.function=own_criterion:gate_where_right")
        cwd = fresh_directory(tmp_path)
        (cwd / "own_criterion.py").write_text(text)
        process = fork(partial(command, asked), cwd)
        assert process.wait() == 0, process.text
        (record,) = [s for s in process.result["stages"] if s["stage"] == "score"]
        found.append((record["key"], record["cached"]))
    assert found[0][0] == found[1][0] != found[2][0]
    assert [cached for _, cached in found] == [False, True, False]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def f(trace):\n    return [[1.0]]\n", "shape (1, 1)"),
        ("import numpy as np\ndef f(trace):\n    return np.full((2, 8), np.nan)\n", "16 numbers"),
        ("def g(trace): ...\n", "has no f"),
        ("import nowhere_at_all\n", "nowhere_at_all"),
    ],
)
def test_a_function_that_gives_no_scores_is_refused(world: World, text: str, said: str) -> None:
    function = "pruning.function=criterion:f"
    done = run_with(world, "criterion", "task=profile", "pruning=custom", function, text=text)
    assert done.code == 2
    assert "pruning.function" in done.err
    assert said in done.err


@pytest.mark.parametrize("task", ["search", "ablate", "stability"])
def test_what_weighs_sums_refuses_a_function(world: World, task: str) -> None:
    done = run_with(world, "criterion", *CRITERION, f"task={task}")
    assert f"task={task} weighs its sums" in done.refused()


def test_an_engine_of_the_users_evaluates(world: World) -> None:
    done = run_with(world, "engine", "task=evaluate", "engine.name=engine:ENGINE")
    assert done.code == 0, done.err
    (record,) = [s for s in done.result["stages"] if s["stage"].startswith("evaluate/")]
    scores = load(world.store / "evaluate" / record["key"], TokenScores)
    assert len(scores) == record["facts"]["scored_tokens"]
    assert (scores.entropy_T == 1).all()
    reports = done.result["reports"]["base"]["UNION"]["64"]
    assert reports["ppl"] == pytest.approx(float(np.exp(-scores.logp_T.mean())))


def test_an_engine_that_only_scores_masks_no_experts(world: World) -> None:
    asked = ("engine.name=engine:ENGINE", "eval.candidates=[masked]")
    assert "engine=unigram cannot mask experts" in run_with(world, "engine", *asked).refused()


@pytest.mark.parametrize("name", ["exllama", "engine:Unigram", "nowhere:ENGINE"])
def test_an_engine_that_is_none_is_refused(world: World, name: str) -> None:
    assert "engine.name" in run_with(world, "engine", f"engine.name={name}").refused()


def lines(path: Path) -> int:
    """Lines of code: without blank ones, imports and docstrings."""
    text = [line for line in path.read_text().splitlines() if line.strip()]
    return sum(not line.startswith(("import ", "from ", '"""')) for line in text)


def test_examples_are_short() -> None:
    assert {path.stem: lines(path) for path in EXAMPLES.glob("*.py") if lines(path) > 25} == {}
