"""eval.tasks through the real lm-evaluation-harness, with tasks of our own on a shipped pack.

Where the extra `tasks` is installed: it and what it needs are 140 MB that CI does not fetch.
"""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from support import tiny
from support.runs import REPOSITORY, Done, World
from support.sglang_standin import StandIn, eager_forward, serving
from support.vllm_standin import VllmStandIn

pytest_plugins = ("support.worlds",)

pytestmark = [
    pytest.mark.harness,
    pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs the extra eaft_prune[tasks]"),
]

PACK = REPOSITORY / "src/eaft_prune/demo/packs/calib_prompt.parquet"
DATA = f"""dataset_path: parquet
dataset_kwargs: {{data_files: {PACK}}}
test_split: train
doc_to_text: "{{{{ text[80:140] }}}}"
"""
CHOICE = """
output_type: multiple_choice
doc_to_target: "{{ text|length % 2 }}"
doc_to_choice: "{{ [text[140:150], text[160:170]] }}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
WRITE = """
output_type: generate_until
generation_kwargs: {until: ["."], max_gen_toks: 5}
doc_to_target: "{{ text[140:145] }}"
metric_list: [{metric: exact_match}, {metric: bleu}]
"""
LEARN = "fewshot_split: train\nnum_fewshot: 2\nfewshot_config: {sampler: default}\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    (folder / "choose.yaml").write_text(f"task: choose\n{DATA}{CHOICE}{LEARN}")
    (folder / "say.yaml").write_text(f"task: say\n{DATA}{WRITE}")
    (folder / "draw.yaml").write_text(
        f"task: draw\n{DATA}{WRITE.replace('max_gen_toks', 'top_p: 0.5, max_gen_toks')}"
    )
    (folder / "run.yaml").write_text(f"task: run\nunsafe_code: true\n{DATA}{WRITE}")
    return folder


def asked(folder: Path, *tasks: str) -> tuple[str, ...]:
    return (
        *(f"eval.tasks=[{','.join(tasks)}]", f"harness.include={folder}", "harness.limit=12"),
        *("harness.batch=5", "eval.num_blocks=4"),
    )


def samples(world: World, done: Done, task: str) -> list[dict[str, Any]]:
    """The harness's own record of what the base answered."""
    (key,) = [s["key"] for s in done.result["stages"] if s["stage"] == f"task/base/{task}"]
    log = json.loads((world.store / "task" / key / "values.json").read_text())["log"]
    return [json.loads(one) for one in log]


def test_a_model_beside_itself_answers_the_same(world: World, folder: Path) -> None:
    done = world.run("task=noise_floor", *asked(folder, "choose", "say"))
    assert done.code == 0, done.out + done.err
    found = done.result["tasks"]["repeat"]
    assert list(found) == ["choose", "say"]
    for task in found.values():
        assert task["samples"] == task["equal"] == 12
        for one in task["metrics"].values():
            change = one["changes"]["dtask"]
            assert (change["low"], change["high"]) == (0, 0)
            assert one["base"] == one["candidate"]
    assert found["say"]["left_out"] == ["bleu"]
    checks = {c["name"]: c for c in done.result["beside"]["repeat"]["checks"] if c["seq_len"] == 0}
    assert checks["dtask_recovery"]["outcome"] == "PASS"
    assert checks["dtask_recovery"]["pack"] == "choose"


def test_the_store_has_samples_and_a_killed_run_its_batches(
    world: World, folder: Path, tmp_path: Path
) -> None:
    place = world.copied(tmp_path)
    command = ("pruning=random", "pruning.core_pos_top_m=0", "pruning.keep_n=4")
    first = place.run(*command, *asked(folder, "choose", "say"))
    assert first.code == 0, first.out + first.err
    stages = {s["stage"]: s for s in first.result["stages"] if s["stage"].startswith("task/")}
    assert set(stages) == {f"task/{m}/{t}" for m in ("base", "pruned") for t in ("choose", "say")}
    values = json.loads(
        (place.store / "task" / stages["task/pruned/choose"]["key"] / "values.json").read_text()
    )
    assert len(values["log"]) == 12
    sample: dict[str, Any] = json.loads(values["log"][3])
    assert sample["doc"]["id"]
    assert len(sample["arguments"]) == 2  # choices
    # 24 continuations and 12 prompts in batches of 5, two models
    homes = [home for home in place.store.glob("answers/*") if home.is_dir()]
    batches = {home: home.stat().st_mtime_ns for home in homes}
    assert len(batches) == 2 * (5 + 3)
    for stage in stages.values():
        shutil.rmtree(place.store / "task" / stage["key"])
    one = next(iter(batches))
    shutil.rmtree(one)
    again = place.run(*command, *asked(folder, "choose", "say"))
    assert again.result["tasks"] == first.result["tasks"]
    made = [home for home, at in batches.items() if home.stat().st_mtime_ns != at]
    assert made == [one]
    third = place.run(*command, *asked(folder, "choose", "say")).result
    assert all(s["cached"] for s in third["stages"])  # of another run: digests are of content
    page = next(first.cwd.rglob("report.html")).read_text()
    assert 'aria-label="Tasks of pruned"' in page


def test_likelihoods_are_those_of_the_model(world: World, folder: Path) -> None:
    """By the harness's own samples, with transformers' plain forward on each alone."""
    import torch

    from eaft_prune.packs.tokenizer import load_tokenizer

    done = world.run("task=noise_floor", *asked(folder, "choose"))
    model, inner = tiny.eager_model(world.model), load_tokenizer(world.model).inner
    for sample in samples(world, done, "choose")[:3]:
        for (context, choice), ((logp, _),) in zip(
            sample["arguments"], sample["resps"], strict=True
        ):
            before, whole = inner(context)["input_ids"], inner(context + choice)["input_ids"]
            with torch.no_grad():
                ln_p = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
            own = sum(float(ln_p[at - 1, whole[at]]) for at in range(len(before), len(whole)))
            assert logp == pytest.approx(own, abs=1e-3)


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_a_server_answers_as_the_model_it_serves(world: World, folder: Path, engine: str) -> None:
    tasks = asked(folder, "choose", "say")
    forward = eager_forward(tiny.eager_model(world.model).requires_grad_(False))
    path = str(world.model)
    server = StandIn(0, path, forward) if engine == "sglang" else VllmStandIn(path, forward)
    if isinstance(server, VllmStandIn):
        server.max_logprobs, server.max_model_len = 64, 4096
    with serving(server):
        at = (f"engine={engine}", f"engine.base_url={server.url}")
        there = world.run("task=noise_floor", *at, *tasks)
    assert there.code == 0, there.out + there.err
    here = world.run("task=noise_floor", *tasks)
    for found, own in zip(
        samples(world, there, "choose"), samples(world, here, "choose"), strict=True
    ):
        assert found["arguments"] == own["arguments"]
        for ((logp, greedy),), ((own_logp, own_greedy),) in zip(
            found["resps"], own["resps"], strict=True
        ):
            assert logp == pytest.approx(own_logp, abs=1e-3)
            assert greedy == own_greedy
    written = [[s["resps"] for s in samples(world, done, "say")] for done in (there, here)]
    assert written[0] == written[1]
    assert len({str(one) for one in written[0]}) > 1
    assert {name: one["metrics"] for name, one in there.result["tasks"]["repeat"].items()} == {
        name: one["metrics"] for name, one in here.result["tasks"]["repeat"].items()
    }


def test_an_answer_stands_in_a_turn_of_the_template(world: World, folder: Path) -> None:
    """The demo's own: scored in the message, written behind the header of the turn."""
    import torch

    from eaft_prune.packs.tokenizer import load_tokenizer

    demo = REPOSITORY / "src/eaft_prune/demo/checkpoint"
    quick = ("eval.num_blocks=2", "harness.limit=3", "harness.chat_template=true")
    done = world.run(
        "task=noise_floor", f"model.path={demo}", *asked(folder, "choose", "say"), *quick
    )
    assert done.code == 0, done.out + done.err
    model, inner = tiny.eager_model(demo), load_tokenizer(demo).inner

    def ln_p(text: str) -> Any:
        with torch.no_grad():
            return (
                model(torch.tensor([inner(text)["input_ids"]])).logits[0].double().log_softmax(-1)
            )

    for sample in samples(world, done, "choose"):
        for (context, choice), ((logp, _),) in zip(
            sample["arguments"], sample["resps"], strict=True
        ):
            assert context.startswith("<|start|>user<|message|>")
            assert context.count("<|start|>assistant<|message|>") == 2  # examples
            assert context.endswith("<|end|><|start|>assistant")
            before = inner(context + "<|message|>")["input_ids"]
            whole = inner(context + "<|message|>" + choice)["input_ids"]
            scores = ln_p(context + "<|message|>" + choice)
            own = sum(float(scores[at - 1, whole[at]]) for at in range(len(before), len(whole)))
            assert logp == pytest.approx(own, abs=1e-3)
    for sample in samples(world, done, "say"):
        ((context, _),), ((said,),) = sample["arguments"], sample["resps"]
        assert context.endswith("<|end|><|start|>assistant")
        text = context
        for _ in range(5):
            text += inner.decode(int(ln_p(text)[-1].argmax()))
        header, final, answer = text.removeprefix(context).partition("<|channel|>final<|message|>")
        assert (header, bool(final)) == ("", True)
        assert said == answer.split("<|")[0].split(".")[0]


def test_an_engine_that_cannot_answer_is_told_beforehand(world: World, folder: Path) -> None:
    done = world.run("engine.name=support.engines:SILENT", *asked(folder, "choose"))
    assert "eval.tasks = ['choose'] needs engine=transformers or" in done.refused()


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ("chose", "did you mean 'choose'?"),
        ("draw", "draw asks for generation_kwargs top_p = 0.5"),
        ("run", "run runs code that the model wrote"),
    ],
)
def test_what_cannot_be_is_said(world: World, folder: Path, task: str, said: str) -> None:
    done = world.run("task=noise_floor", *asked(folder, task))
    assert done.code == 2
    assert said in done.out + done.err
    # before anything is measured
    assert not [s for s in done.result["stages"] if s["stage"].startswith("evaluate/")]
