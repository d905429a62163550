"""reap-scores.yaml and reap-recipe.yaml hold what is needed to cut again and to run again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from support.runs import Done, World, main

from eaft_prune.checkpoints.families import family_of
from eaft_prune.checkpoints.read import file_hashes, model_digest, open_model
from eaft_prune.cli.arguments import parse
from eaft_prune.cli.grammar import written
from eaft_prune.cli.main import check
from eaft_prune.core.store import load
from eaft_prune.core.types import ExpertScores, KeepPlan, UserError
from eaft_prune.records.recipe import read_recipe, recipe_text
from eaft_prune.records.scores import ScoresFile, read_scores, scores_file, scores_text
from eaft_prune.stages.export import Target, export

pytest_plugins = ("support.worlds",)

FINITE = st.floats(allow_nan=False, allow_infinity=False)


@pytest.fixture(scope="module")
def quick(world: World) -> Done:
    """The quick pipeline in the shared store, and the checkpoint it wrote."""
    done = world.run()
    assert done.code == 0, done.out + done.err
    return done


def beside(done: Done, name: str) -> Path:
    return Path(done.result["checkpoint"]["path"]) / name


def stages(done: Done) -> dict[str, str]:
    return {stage["stage"]: stage["key"] for stage in done.result["stages"]}


@given(
    score=arrays.arrays(np.float64, (2, 3), elements=FINITE),
    positive=arrays.arrays(np.float64, (2, 3), elements=FINITE),
    count=arrays.arrays(np.int64, (2, 3), elements=st.integers(0, 2**62)),
)
def test_scores_are_read_back_to_the_bit(
    score: np.ndarray[Any, Any],
    positive: np.ndarray[Any, Any],
    count: np.ndarray[Any, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    path = tmp_path_factory.getbasetemp() / "scores.yaml"
    tokens = {"good": 2, "uncertain": 3, "conflict": 0}
    scores = ExpertScores(score, positive, count, tokens, np.stack([positive, score, positive]))
    base = {"label": "x", "digest": "d"}
    file = scores_file(scores, "reap", {"w_good": 0.1, "seed": 0}, base, 2)
    path.write_text(scores_text(file))
    again = read_scores(path)
    assert again == file
    for name in ("score_LE", "positive_mass_LE", "count_LE", "pack_mass_PLE"):
        mine, theirs = getattr(again.scores, name), getattr(scores, name)
        assert mine.dtype == theirs.dtype
        assert mine.tobytes() == theirs.tobytes()
    assert again.scores.region_tokens == scores.region_tokens


def test_the_exported_scores_are_those_the_plan_was_cut_from(world: World, quick: Done) -> None:
    file = read_scores(beside(quick, "reap-scores.yaml"))
    stored = load(world.store / "score" / stages(quick)["score"], ExpertScores)
    assert file.scores.score_LE.tobytes() == stored.score_LE.tobytes()
    assert file.scores.positive_mass_LE.tobytes() == stored.positive_mass_LE.tobytes()
    assert file.scores.count_LE.tobytes() == stored.count_LE.tobytes()
    assert file.scores.pack_mass_PLE.tobytes() == stored.pack_mass_PLE.tobytes()
    assert file.base["digest"] == quick.result["base"]["digest"]
    assert (file.criterion, file.n_experts, file.top_k) == ("eaft_reap", 8, 2)


def test_the_recipe_says_how_the_checkpoint_was_made(world: World, quick: Done) -> None:
    recipe = read_recipe(beside(quick, "reap-recipe.yaml"))
    facts = {stage["stage"]: stage["facts"] for stage in quick.result["stages"]}
    assert recipe.base == {
        "label": "local", "digest": quick.result["base"]["digest"], "path": str(world.model),
    }  # fmt: skip
    assert list(recipe.packs) == list(world.packs)
    assert recipe.profile_tokens == facts["pack/profile/UNION/64"]["token_digest"]
    assert recipe.profile_rows == facts["pack/profile/UNION/64"]["rows_digest"]
    assert recipe.plan["digest"] == quick.result["plan"]["digest"]
    assert recipe.plan["kept"] == quick.result["plan"]["kept"]
    assert recipe.gate == quick.result["gate"]["name"]
    assert recipe.settings["pruning"]["keep_n"] == 4
    asked = {"num_blocks": 8, "seq_len": 64, "seed": None, "early_stop": False}
    assert recipe.settings["profile"].items() >= asked.items()
    text = beside(quick, "reap-recipe.yaml").read_text()
    assert recipe_text(recipe) == text


def test_a_recipe_is_run_again_and_later_settings_override_it(world: World, quick: Done) -> None:
    recipe = beside(quick, "reap-recipe.yaml")
    # what the recipe must bring along: these stand before it and say otherwise
    other = ("pruning.keep_n=8", "pruning.w_conflict=-1", "profile.num_blocks=4")
    again = world.run("task=profile", *other, f"recipe={recipe}")
    assert again.result["plan"] == quick.result["plan"]
    kept = ("profile", "score", "plan")
    assert [stages(again)[n] for n in kept] == [stages(quick)[n] for n in kept]
    larger = world.run("task=profile", f"recipe={recipe}", "pruning.keep_n=8")
    assert [len(ids) for ids in larger.result["plan"]["kept"]] == [8, 8]


def test_a_plan_is_cut_from_a_scores_file_alone(world: World, quick: Done, tmp_path: Path) -> None:
    scores = tmp_path / "scores.yaml"
    scores.write_bytes(beside(quick, "reap-scores.yaml").read_bytes())
    settings = ("pruning.keep_multiple=1", "pruning.keep_n=5", "pruning.core_count_top_m=2")
    done = world.run("task=plan", f"scores={scores}", "model.path=/nowhere", *settings)
    assert done.code == 0, done.out + done.err
    wanted = world.run("task=profile", *settings).result["plan"]
    assert done.result["plan"] == wanted
    (path,) = done.cwd.rglob("plan.json")
    plan = json.loads(path.read_text())
    assert (plan["kept"], plan["digest"]) == (wanted["kept"], wanted["digest"])
    assert wanted["digest"] in done.out
    assert done.result["stages"] == []
    error = world.run("task=plan", f"scores={scores}", "pruning.keep_n=12").failed()
    assert "keep_n must be in 2..8" in error


def test_a_pipeline_with_scores_profiles_nothing_and_ends_the_same(
    world: World, quick: Done, tmp_path: Path
) -> None:
    place = world.elsewhere(tmp_path)
    done = place.run(f"scores={beside(quick, 'reap-scores.yaml')}")
    assert done.code == 0, done.out + done.err
    assert "profile" not in stages(done)
    assert not any(name.startswith("pack/profile") for name in stages(done))
    for name in ("plan", "export", "evaluate/pruned/UNION/64"):
        assert stages(done)[name] == stages(quick)[name]
    assert done.result["reports"] == quick.result["reports"]
    recipe = read_recipe(beside(done, "reap-recipe.yaml"))
    assert recipe.profile_tokens is None
    assert recipe.scores is not None
    written = [beside(item, "reap-scores.yaml").read_bytes() for item in (done, quick)]
    assert written[0] == written[1]


def test_scores_of_other_settings_or_another_base_are_refused(
    world: World, quick: Done, tmp_path: Path
) -> None:
    scores = beside(quick, "reap-scores.yaml")
    error = world.run(f"scores={scores}", "pruning.w_conflict=-1", "pruning.reduce=mean").failed()
    assert "pruning.w_conflict=-2.0" in error
    assert "pruning.reduce=sum" in error
    other = tmp_path / "other.yaml"
    digest = quick.result["base"]["digest"]
    other.write_text(scores.read_text().replace(digest, "f" * 64))
    assert digest in world.run(f"scores={other}").failed()
    assert "drop scores" in world.run("task=search", f"scores={scores}").refused()
    assert "scores=FILE" in world.run("task=plan").refused()


def damaged(values: dict[str, Any], how: str) -> Any:
    match how:
        case "a layer too few":
            values["layers"][0]["layer"] = 1
        case "an expert too few":
            values["layers"][1]["count"].pop()
        case "unknown key":
            values["more"] = 1
        case "missing key":
            del values["top_k"]
        case "not a number":
            values["layers"][0]["score"][3] = float("nan")
        case "text":
            return "scores"
    return values


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("a layer too few", "layers must be numbered"),
        ("an expert too few", "layer 1 does not have 8 experts"),
        ("unknown key", "more"),
        ("missing key", "top_k"),
        ("not a number", "layers.0.score.3"),
        ("text", "ScoresFile"),
    ],
)
def test_a_damaged_scores_file_is_one_line(
    world: World, quick: Done, tmp_path: Path, how: str, said: str
) -> None:
    values = yaml.safe_load(beside(quick, "reap-scores.yaml").read_text())
    path = tmp_path / "scores.yaml"
    path.write_text(yaml.safe_dump(damaged(values, how)))
    error = world.run("task=plan", f"scores={path}").failed()
    assert said in error
    assert str(path) in error


def test_a_missing_recipe_is_refused_before_anything_runs(world: World) -> None:
    assert "nowhere.yaml cannot be read" in world.run("recipe=nowhere.yaml").refused()


def test_records_are_hashed_but_no_part_of_the_model(checkpoint: Path, tmp_path: Path) -> None:
    """Neither its digest, nor what is copied when the checkpoint is pruned again."""
    files = open_model(checkpoint)
    family = family_of(files.config)
    how = {"base": {"label": "tiny", "digest": "b" * 64}}
    plan = KeepPlan(((0, 2, 3, 7), (1, 2, 4, 5)), 8)
    texts = {"reap-recipe.yaml": "a: 1\n", "reap-scores.yaml": "b: 2\n"}
    done = [
        export(
            family, files, plan, Target(tmp_path / name, "key", 10**9, how, extra), lambda n: None
        )
        for name, extra in (("with", texts), ("without", {}))
    ]
    assert done[0].digest == done[1].digest
    manifest = json.loads((done[0].path / "manifest.json").read_text())
    assert set(manifest["records"]) == {*texts, "expert_mapping.json"}
    assert not set(manifest["files"]) & set(manifest["records"])
    pruned = open_model(done[0].path)
    assert not set(pruned.companions) & set(texts)
    assert model_digest(file_hashes(pruned, lambda n: None)) == done[0].digest
    smaller = KeepPlan(((0, 1), (2, 3)), 4)
    export(
        family, pruned, smaller, Target(tmp_path / "twice", "key", 10**9, how, {}), lambda n: None
    )
    assert not set(texts) & {item.name for item in (tmp_path / "twice").iterdir()}


def test_the_file_is_the_schema(quick: Done) -> None:
    """Every field of the file is there when it is written: nothing relies on a default."""
    values = yaml.safe_load(beside(quick, "reap-scores.yaml").read_text())
    assert set(values) == set(ScoresFile.model_fields)


SHELL = {"_target_": "os.system", "command": "touch ran"}
FOREIGN: list[tuple[dict[str, Any], str]] = [
    ({"+hydra": {"callbacks.x": SHELL}}, "'+hydra' is not for a recipe"),
    ({"hydra": {"sweeper": SHELL}}, "'hydra' is not for a recipe"),
    ({"engine": {"name": "sglang", "python": "/bin/sh"}}, "'engine' is not for a recipe"),
    ({"gate": {"metrics": {"evil:M": 0.1}}}, "'gate' is not for a recipe"),
    ({"export": {"path": "/tmp/x"}}, "'export' is not for a recipe"),
    ({"packs": {"files": {"a": "/etc/passwd"}}}, "'packs.files' is not for a recipe"),
    ({"pruning": {"keep_n=4 +hydra": 1}}, "is not for a recipe"),
    ({"pruning": {"keep_n": "many"}}, "pruning.keep_n: Input should be a valid integer"),
    ({"pruning": {"pack_weights": {"a": {"_target_": "os.system"}}}}, "pruning.pack_weights.a"),
    ({"profile": {"seed": "${oc.env:HOME}"}}, "profile.seed"),
    ({"pruning": {"saliency": "custom", "function": "evil:f"}}, "pruning.function=evil:f; read it"),
    ({"pruning": ["keep_n"]}, "settings.pruning"),
]


@pytest.mark.parametrize(("settings", "said"), FOREIGN, ids=lambda value: str(value)[:50])
def test_a_recipe_sets_what_a_recipe_is_for_and_runs_nothing(
    quick: Done, tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    values = yaml.safe_load(beside(quick, "reap-recipe.yaml").read_text())
    (tmp_path / "strange.yaml").write_text(yaml.safe_dump({**values, "settings": settings}))
    (tmp_path / "evil.py").write_text("open('ran', 'w')\nf = M = None\n")
    assert said in main(["recipe=strange.yaml", "sweep.plan_only=true"], tmp_path).refused()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evil.py", "strange.yaml"]


def test_a_recipe_with_a_module_wants_it_typed_too(quick: Done, tmp_path: Path) -> None:
    values = yaml.safe_load(beside(quick, "reap-recipe.yaml").read_text())
    custom = {"name": "mine", "saliency": "custom", "function": "criterion:gate", "keep_n": 4}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({**values, "settings": {"pruning": custom}}))
    typed = f"recipe={tmp_path / 'mine.yaml'}", "pruning.function=criterion:gate"
    assert "pruning.function='criterion:gate'" in parse(typed).overrides
    with pytest.raises(UserError, match="read it"):
        parse([typed[0], "pruning.function=criterion:other"])


WEIGHTS = st.dictionaries(
    st.sampled_from(["reasoning_style", "tool_agentic", "calib_prompt"]),
    st.floats(0.001, 1000),
    min_size=1,
)
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "pruning.pack_weights": WEIGHTS,
        "pruning.w_conflict": st.floats(-50, 50),
        "pruning.w_good": st.floats(0.001, 50),
        "pruning.seed": st.integers(0, 2**40),
        "pruning.regions": st.sampled_from(["strict", "policy", "soft"]),
        "profile.seed": st.none() | st.integers(0, 2**40),
        "profile.num_blocks": st.just("all") | st.integers(1, 10**6),
        "marginal.num_blocks": st.integers(1, 10**6),
        "compensation.ridge": st.just("auto") | st.floats(1e-6, 10),
        "compensation.seed": st.integers(0, 2**40),
        "packs.profile_fraction": st.floats(0.001, 0.999),
    },
)


@given(asked=OPTIONS)
@settings(max_examples=15)
def test_a_recipe_stands_for_the_settings_it_was_written_from(
    asked: dict[str, Any], quick: Done, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Through YAML, Hydra's grammar and the settings' own models, to the last bit."""
    overrides = [f"{name}={written(value)}" for name, value in asked.items()]
    ours = check(overrides).experiments[0].model_dump(mode="json")
    recipe = read_recipe(beside(quick, "reap-recipe.yaml"))
    sections = {
        section: {key: ours[section][key] for key in values}
        for section, values in recipe.settings.items()
    }
    path = tmp_path_factory.getbasetemp() / "recipe.yaml"
    path.write_text(recipe_text(recipe.model_copy(update={"settings": sections})))
    again = check([f"recipe={path}"]).experiments[0].model_dump(mode="json")
    for section, values in sections.items():
        assert {key: again[section][key] for key in values} == values
