"""Command lines that compose, and command lines that are refused in one line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from support import runs
from support.runs import REPOSITORY

from eaft_prune.cli.compose import register_defaults
from eaft_prune.cli.main import check
from eaft_prune.config import Experiment, Settings, parse_experiment
from eaft_prune.core.types import UserError

CONF = REPOSITORY / "conf"
GROUPS = sorted(path.name for path in CONF.iterdir() if path.is_dir())
OPTIONS = sorted(
    f"{path.parent.name}={path.stem}"
    for path in CONF.glob("*/*.yaml")
    if not path.stem.startswith("_")
)
SWEEPS = sorted(path.stem for path in (REPOSITORY / "sweeps").glob("*.yaml"))
NEEDS = {
    "model=local": ["model.path=/somewhere"],
    "packs=local": ["packs.files={mine: /somewhere/mine.parquet}"],
    "pruning=custom": ["pruning.function=operator:itemgetter"],
    "task=compare": ["compare.base=a", "compare.candidate=b"],
    "task=plan": ["scores=reap-scores.yaml"],
    "task=replay": ["replay.lock=run.lock.yaml"],
    "task=verify": ["verify.path=a"],
    "task=usage": ["engine=sglang", "engine.python=python", "pruning=frequency"],
    "task=engine_parity": ["engine=sglang", "engine.base_url=http://somewhere:30000"],
    "task=candidate": ["candidate.path=/dir"],
    "task=publish": ["publish.repo=me/pruned", "publish.run=/dir"],
    "engine=sglang": ["engine.python=python"],
    "engine=sglang_hopper": ["engine.python=python"],
    "engine=sglang_blackwell": ["engine.python=python"],
    "engine=vllm": ["engine.python=python"],
    "engine=llamacpp": ["engine.python=python", "engine.converter=convert_hf_to_gguf.py"],
    "task=gguf": ["engine=llamacpp", "engine.python=python", "engine.converter=converter.py"],
}


def test_the_groups_of_the_contract_are_there() -> None:
    assert set(GROUPS) >= {
        "model", "packs", "pruning", "eval", "gate", "engine", "tracking", "runtime", "task",
        "experiment",
    }  # fmt: skip
    assert set(OPTIONS) >= {
        *(f"model={name}" for name in ("demo", "gpt_oss_20b", "gpt_oss_120b", "local")),
        *(f"packs={name}" for name in ("demo", "harmony_calib_v2", "local")),
        *(f"eval={n}" for n in ("demo", "bigblocks", "longseq_1m", "longseq_10m", "extreme")),
        *(f"task={name}" for name in ("pipeline", "profile", "evaluate", "compare")),
        *(f"task={name}" for name in ("noise_floor", "noop", "expert_math")),
    }
    published = [option for option in OPTIONS if option.startswith("experiment=")]
    for result in ("keep24", "keep20", "keep16", "noise_floor", "noop"):
        assert any(result in name and "20b" in name for name in published), result
    assert SWEEPS


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_composes_and_validates(option: str) -> None:
    invocation = check([option, *NEEDS.get(option, [])])
    assert not invocation.multirun
    assert len(invocation.points) == 1


@pytest.mark.dear
@pytest.mark.parametrize("task", ["predownload", "prune"])
def test_every_experiment_takes_every_milestone(task: str) -> None:
    for option in (option for option in OPTIONS if option.startswith("experiment=")):
        if (task, option) == ("prune", "experiment=20b_keep20_keep_floor"):
            with pytest.raises(UserError, match=r"export.pad_ragged=true"):
                check([option, f"task={task}"])
            continue
        (experiment,) = check([option, f"task={task}"]).experiments
        assert experiment.task.name == task


@pytest.mark.parametrize("sweep", SWEEPS)
def test_every_sweep_composes_and_validates_without_m(sweep: str) -> None:
    invocation = check([f"+sweeps={sweep}"])
    assert invocation.multirun
    assert len(invocation.points) > 1
    assert len(set(invocation.points)) == len(invocation.points)


@pytest.mark.dear
@pytest.mark.slow
def test_the_sweep_of_criteria_has_each_that_needs_no_measuring_once() -> None:
    """Criteria that differ in their name alone are one point."""
    distinct: dict[str, set[str]] = {}
    for option in (option for option in OPTIONS if option.startswith("pruning=")):
        experiments = check([option, *NEEDS.get(option, [])]).experiments
        (settings,) = (one.pruning for one in experiments)
        if not settings.measured and settings.function is None:
            same = distinct.setdefault(
                settings.model_copy(update={"name": ""}).model_dump_json(), set()
            )
            same.add(settings.name)
    swept = [one.pruning.name for one in check(["+sweeps=criteria"]).experiments]
    assert len(swept) == len(distinct)
    assert all(len(same & set(swept)) == 1 for same in distinct.values())


@pytest.mark.dear
def test_a_sweep_and_a_line_of_ones_own_multiply() -> None:
    alone = check(["+sweeps=seeds"])
    both = check(["+sweeps=seeds", "pruning.keep_n=28,24"])
    assert len(both.points) == 2 * len(alone.points)


@pytest.mark.parametrize(
    "swept",
    [
        ["gate.max_dppl=0.2,0.3", "eval.seed=1,2"],  # values alone
        ["packs.files={mine: a}", "eval.seed=1,2", "pruning.name=${packs.name},b"],
        ["pruning=reap,eaft_reap", "pruning.keep_n=20,24"],
        ["pruning.keep_n=20", "eval.num_blocks.UNION=3,4"],
        ["eval.num_blocks=3,all"],
    ],
)
def test_a_point_is_what_its_own_line_composes(swept: list[str]) -> None:
    invocation = check(["-m", *swept])
    alone = [check(list(point)).experiments[0] for point in invocation.points]
    assert list(invocation.experiments) == alone


@pytest.mark.parametrize("position", ["first", "middle", "last"])
def test_m_may_stand_anywhere(position: str) -> None:
    words = ["pruning.keep_n=20", "eval.seed=1,2,3"]
    words.insert({"first": 0, "middle": 1, "last": 2}[position], "-m")
    invocation = check(words)
    assert invocation.multirun
    ours = ("eval.", "pruning.")
    swept = [[o for o in point if o.startswith(ours)] for point in invocation.points]
    assert swept == [["pruning.keep_n=20", f"eval.seed={seed}"] for seed in (1, 2, 3)]


def test_the_issue_s_m_line_as_written() -> None:
    """`pruning.keep_n=20 -m eval.seed=1,2,3`: an override on either side of -m."""
    assert len(check(["pruning.keep_n=20", "-m", "eval.seed=1,2,3"]).points) == 3
    assert len(check(["pruning.keep_n=20", "--multirun", "eval.seed=1,2,3"]).points) == 3


def composed(*overrides: str, home: Path) -> dict[str, Any]:
    """What `--cfg job --resolve` prints."""
    done = runs.main(["--cfg", "job", "--resolve", *overrides], home)
    assert done.code == 0, done.err
    values = yaml.safe_load(done.out)
    assert isinstance(values, dict)
    return values


def test_a_gate_does_not_stand_beside_itself(tmp_path: Path) -> None:
    """Its limits may have been changed on the command line: two verdicts of one name confuse."""
    usual = parse_experiment(composed(home=tmp_path)).second_gate
    assert usual is not None
    assert usual.name == "near_lossless_v2"
    alone = composed("gate=near_lossless_v2", "gate.max_dloop_rate=0.5", home=tmp_path)
    assert parse_experiment(alone).second_gate is None


@pytest.mark.slow
def test_every_setting_can_be_overridden_without_a_plus(tmp_path: Path) -> None:
    """Hydra refuses `key=value` for a key that the composed config does not hold."""
    missing = []
    for section, field in Experiment.model_fields.items():
        # a section of one task only comes with that task
        own = [f"task={section}"] if f"task={section}" in OPTIONS else []
        values = composed(*own, home=tmp_path)
        if section not in values:
            missing.append(section)
            continue
        kinds = [field.annotation, *get_args(field.annotation)]
        for settings in (k for k in kinds if isinstance(k, type) and issubclass(k, Settings)):
            fields = settings.model_fields
            missing += [f"{section}.{name}" for name in fields if name not in values[section]]
    assert missing == []


def test_one_count_replaces_the_demo_s_mapping_of_counts() -> None:
    check(["eval.num_blocks=8"])
    check(["eval.num_blocks.UNION=8"])
    check(["+eval.num_blocks.reasoning_style=8"])  # a key of one's own, so Hydra wants the plus


def test_a_count_a_length_replaces_the_demo_s_mapping_of_counts() -> None:
    check(["eval.num_blocks=[8,4]"])


def test_the_environment_says_where_runs_are_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def uri(*overrides: str) -> str:
        return str(composed(*overrides, home=tmp_path)["tracking"]["uri"])

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert uri() == "sqlite:///mlruns/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracker:5000")
    assert uri() == "http://tracker:5000"
    assert uri("tracking.uri=sqlite:///mine.db") == "sqlite:///mine.db"


@pytest.mark.parametrize(
    "overrides",
    [
        ["tracking.tags={owner: me}"],
        ["eval.num_blocks={UNION: 4, default: 2}"],
        ["packs=local", "packs.files={mine: a.parquet, other: b.parquet}"],
    ],
)
def test_settings_that_hold_a_mapping_take_one_without_a_plus(overrides: list[str]) -> None:
    check(overrides)


# what is typed, and what the one line must say: key, value, and what is allowed or meant
REFUSED = {
    "unknown key": (["pruning.keepn=4"], ["pruning.keepn", "pruning.keep_n"]),
    "unknown top-level key": (["runtme.device=cpu"], ["runtme.device", "runtime.device"]),
    "unknown plus key": (["+pruning.keepn=4"], ["pruning.keepn", "pruning.keep_n"]),
    "unknown pack key": (["packs.splt=none"], ["packs.splt", "packs.split"]),
    "unknown option": (["pruning=eaft_reaps"], ["pruning", "eaft_reaps", "eaft_reap", "frequency"]),
    "unknown experiment": (["experiment=20b_kep24"], ["experiment", "20b_kep24", "20b_keep24"]),
    "unknown sweep": (["+sweeps=seedz"], ["sweeps", "seedz", "seeds"]),
    "sglang, no server": (["engine=sglang"], ["engine.base_url", "engine.python"]),
    "sglang, two servers": (
        ["engine=sglang", "engine.python=p", "engine.base_url=http://a:1"],
        ["engine.base_url", "engine.python", "exactly one"],
    ),
    "vllm, no server": (["engine=vllm"], ["engine.base_url", "engine.python"]),
    "llamacpp, no converter": (["engine=llamacpp", "engine.python=p"], ["engine.converter"]),
    "gguf by whom": (["task=gguf"], ["task=gguf", "engine=llamacpp"]),
    "transformers, a server": (["engine.python=p"], ["engine.python", "engine=sglang"]),
    "one server, two checkpoints": (
        ["engine=sglang", "engine.base_url=http://a:1"],
        ["engine.base_url", "task=pipeline", "task=compare"],
    ),
    "sglang masks": (
        ["engine=sglang", "engine.python=p", "eval.candidates=[masked]"],
        ["mask", "engine=transformers"],
    ),
    "sglang ablates": (["engine=sglang", "engine.python=p", "task=ablate"], ["mask", "ablate"]),
    "sglang, top log-probs": (
        ["eval.top_logprobs=true"],
        ["eval.top_logprobs", "eval.kl_top_k"],
    ),
    "usage without a server": (["task=usage"], ["task=usage", "engine=sglang"]),
    "usage of norms": (
        ["task=usage", "engine=sglang", "engine.python=p"],
        ["pruning=frequency", "eaft_reap"],
    ),
    "unknown task": (["task=pipelin"], ["task", "pipelin", "pipeline"]),
    "not a number": (["pruning.keep_n=many"], ["pruning.keep_n", "many", "integer"]),
    "a fraction": (["pruning.keep_n=4.5"], ["pruning.keep_n", "4.5", "integer"]),
    "not a bool": (["runtime.progress=perhaps"], ["runtime.progress", "perhaps", "bool"]),
    "null": (["pruning.keep_n=null"], ["pruning.keep_n", "None", "integer"]),
    "not allowed": (["pruning.reduce=max"], ["pruning.reduce", "max", "sum", "mean"]),
    "bad saliency": (["pruning.saliency=norms"], ["pruning.saliency", "norms", "gate_norm"]),
    "bad split": (["packs.split=half"], ["packs.split", "half", "hash", "none"]),
    "bad dtype": (["runtime.dtype=int8"], ["runtime.dtype", "int8", "float32", "bfloat16"]),
    "bad on_fail": (["gate.on_fail=shout"], ["gate.on_fail", "shout", "report", "error"]),
    "zero": (["pruning.keep_n=0"], ["pruning.keep_n", "0", "1"]),
    "negative seed": (["eval.seed=-1"], ["eval.seed", "-1", "0"]),
    "quantile of one": (["pruning.quantile=1"], ["pruning.quantile", "1", "less than 1"]),
    "negative limit": (["gate.max_js2d=-0.1"], ["gate.max_js2d", "-0.1", "0"]),
    "NaN limit": (["gate.max_js2d=nan"], ["gate.max_js2d", "nan"]),
    "infinite limit": (["gate.max_dppl=inf"], ["gate.max_dppl", "inf"]),
    "NaN weight": (["pruning.w_conflict=nan"], ["pruning.w_conflict", "nan"]),
    "infinite weight": (["pruning.w_good=inf"], ["pruning.w_good", "inf"]),
    "length in a list": (["eval.seq_lens=[1024,x]"], ["eval.seq_lens.1", "x", "integer"]),
    "length of one": (["eval.seq_lens=[1]"], ["eval.seq_lens", "1", "2"]),
    "no lengths": (["eval.seq_lens=[]"], ["eval.seq_lens"]),
    "keep multiple": (["pruning.keep_n=6"], ["pruning.keep_n", "6", "keep_multiple", "4"]),
    "unknown pack": (["eval.packs=[UNIN]"], ["eval.packs", "UNIN", "UNION", "tool_agentic"]),
    "gate off": (["eval.packs=[tool_agentic]"], ["gate.pack", "UNION", "tool_agentic"]),
    "gate length": (["gate.seq_lens=[512]"], ["gate.seq_lens", "512", "eval.seq_lens", "1024"]),
    "counts": (
        ["eval=bigblocks", "eval.num_blocks=[1,2,3]"],
        ["num_blocks", "3", "seq_lens", "1024"],
    ),
    "counts of": (["+eval.num_blocks.UNIN=3"], ["eval.num_blocks", "UNIN", "UNION"]),
    "counts of, no plus": (["eval.num_blocks.UNIN=3"], ["eval.num_blocks", "UNIN", "UNION"]),
    "weight of": (
        ["pruning.pack_weights={tool_agentik: 2}"],
        ["pruning.pack_weights", "tool_agentik", "tool_agentic", "calib_prompt"],
    ),
    "negative pack weight": (
        ["pruning.pack_weights={tool_agentic: -1}"],
        ["pruning.pack_weights.tool_agentic", "-1", "0"],
    ),
    "bad sampling": (["pruning.sampling=per_pack"], ["pruning.sampling", "per_pack", "per_file"]),
    "bad selection": (["pruning.selection=all"], ["pruning.selection", "all", "effective_number"]),
    "no width": (["pruning.regions=soft", "pruning.soft_width=0"], ["pruning.soft_width", "0"]),
    "ragged export": (
        ["pruning.selection=coverage"],
        ["pruning.selection", "coverage", "masked", "export.pad_ragged"],
    ),
    "twice": (["eval.candidates=[masked,masked]"], ["candidates", "masked", "twice"]),
    "two sources": (["model.hub_id=a/b"], ["path", "hub_id"]),
    "UNION as a name": (["+packs.files.UNION=x.parquet"], ["UNION"]),
    "no model path": (["model=local"], ["model.path", "missing", "model.path=DIR"]),
    "no files": (["packs=local"], ["packs.files", "missing"]),
    "no comparison": (["task=compare"], ["compare.base", "missing"]),
    "not an override": (["keep_n"], ["keep_n"]),
    "unclosed list": (["eval.seq_lens=[1024"], ["eval.seq_lens"]),
    "one point of many": (["-m", "pruning.keep_n=28,30,24"], ["pruning.keep_n", "30", "multiple"]),
    "one point's type": (["-m", "eval.seed=1,two"], ["eval.seed", "two", "integer"]),
    "one point's option": (["-m", "pruning=reap,reep"], ["pruning", "reep", "reap"]),
    "sweep without -m": (["eval.seed=1,2"], ["eval.seed", "1,2"]),
}


@pytest.mark.parametrize("case", sorted(REFUSED))
def test_a_bad_command_line_is_one_line_and_code_2(case: str, tmp_path: Path) -> None:
    overrides, said = REFUSED[case]
    # were it not refused it would run: then let it fail at once, not after the demo
    done = runs.main(["runtime.store_dir=/dev/null/store", *overrides], tmp_path)
    line = done.refused()
    for word in said:
        assert word in line, (word, line)
    assert done.out == ""
    assert list(tmp_path.iterdir()) == []  # no job began: no outputs, no database, no store


def test_two_bad_settings_are_two_lines() -> None:
    with pytest.raises(UserError) as caught:
        check(["pruning.reduce=max", "gate.on_fail=shout"])
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("pruning.reduce")
    assert lines[1].startswith("gate.on_fail")


@pytest.mark.process
def test_refused_before_torch_is_even_imported(tmp_path: Path) -> None:
    code = (
        "import sys; from eaft_prune.cli.main import main; code = main(sys.argv[1:]); "
        "print([m for m in ('torch', 'transformers', 'mlflow') if m in sys.modules]); "
        "sys.exit(code)"
    )
    done = runs.process(["pruning.keepn=4"], tmp_path, code=code)
    assert done.code == 2
    assert "did you mean pruning.keep_n?" in done.err
    assert re.findall(r"'torch'|'transformers'", done.out) == []


def test_settings_are_frozen_and_equal_lines_give_equal_settings() -> None:
    def settings() -> object:
        import hydra
        from omegaconf import OmegaConf

        register_defaults()
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            values = OmegaConf.to_container(hydra.compose("config"), resolve=True)
        assert isinstance(values, dict)
        return parse_experiment({str(k): v for k, v in values.items()})

    one, other = settings(), settings()
    assert one == other
    with pytest.raises(ValueError, match="frozen"):
        one.task = None  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--help"], "pruning"),
        (["--cfg", "job"], "keep_n: 28"),
        (["--cfg", "job", "pruning.keep_n=24"], "keep_n: 24"),
        (["--cfg", "job", "--package", "pruning"], "keep_multiple: 4"),
        (["--cfg", "job", "experiment=20b_keep16"], "keep_n: 16"),
    ],
)
def test_help_and_cfg_print_and_run_nothing(
    arguments: list[str], said: str, tmp_path: Path
) -> None:
    done = runs.main(arguments, tmp_path)
    assert done.code == 0
    assert said in done.out
    assert list(tmp_path.iterdir()) == []


LEVERS = sorted(p.stem for p in (CONF / "experiment").glob("20b_keep2?_*.yaml"))
LEVERS = [name for name in LEVERS if "longseq" not in name]


@pytest.mark.parametrize("lever", LEVERS)
def test_a_lever_is_its_experiment_with_one_change(lever: str) -> None:
    """What else differs (masked evaluation of unequal layers) is what the change asks for."""
    plain, changed = (
        check([f"experiment={name}"]).experiments[0].model_dump()
        for name in (lever[: len("20b_keep20")], lever)
    )
    different = {
        f"{section}.{key}"
        for section in plain
        if isinstance(plain[section], dict)
        for key in plain[section]
        if plain[section][key] != changed[section][key]
    }
    if lever.endswith("keep_floor"):
        assert different == {"pruning.selection", "pruning.min_keep_n", "eval.candidates"}
    elif lever.endswith("top_k2"):
        assert different == {"eval.top_k", "eval.candidates"}
    else:
        assert len(different) == 1, different


def test_pack_weights_take_the_users_names() -> None:
    def weights(*overrides: str) -> dict[str, float]:
        return check(overrides).experiments[0].pruning.pack_weights

    assert weights() == {}
    assert weights("pruning.pack_weights={tool_agentic: 2}") == {"tool_agentic": 2}
    assert weights("pruning.pack_weights.tool_agentic=2") == {"tool_agentic": 2}
    points = check(["+sweeps=pack_weights"]).experiments
    assert len({tuple(p.pruning.pack_weights.items()) for p in points}) == 9


NAMES = [
    "..",
    ".",
    "",
    "a/b",
    "../../x",
    "/etc",
    "a\\b",
    "-rf",
    "a\nb",
    "a\0b",
    ".hidden",
    "n" * 101,
]


@pytest.mark.parametrize("name", NAMES, ids=repr)
@pytest.mark.parametrize("section", ["model", "packs", "eval", "gate", "pruning"])
def test_a_name_that_could_leave_its_directory_is_refused(section: str, name: str) -> None:
    (experiment,) = check([]).experiments
    values = experiment.model_dump(mode="json")
    values[section]["name"] = name
    with pytest.raises(UserError, match=rf"{section}\.name = .*a name may become") as caught:
        parse_experiment(values)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_a_pack_is_named_so_that_it_stays_where_it_is_put(name: str) -> None:
    (experiment,) = check([]).experiments
    values = experiment.model_dump(mode="json")
    values["packs"]["files"][name] = "a.parquet"
    with pytest.raises(UserError, match=r"packs\.files.*a name may become") as caught:
        parse_experiment(values)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a", "gpt_oss_20b", "tägliches", "v1.2-b c", "7b", "_x"])
def test_usual_names_are_taken(name: str) -> None:
    (experiment,) = check([]).experiments
    values = experiment.model_dump(mode="json")
    values["model"]["name"], values["packs"]["files"] = name, {name: "a.parquet"}
    found = parse_experiment(values)
    assert (found.model.name, [*found.packs.files]) == (name, [name])
