"""Every file of tools/ runs, at a size that takes a second or two."""

from __future__ import annotations

import importlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from support.engines import options
from support.runs import REPOSITORY

pytestmark = pytest.mark.process

TOOLS = REPOSITORY / "tools"
CONVERSATION = [
    {"role": "user", "content": "How many letters are in {}?"},
    {"role": "assistant", "channel": "analysis", "content": "I count the letters of {} now."},
    {"role": "assistant", "channel": "final", "content": "There are as many as {} has: {}."},
]


@pytest.fixture(autouse=True)
def beside_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `python tools/x.py` finds its neighbours."""
    monkeypatch.syspath_prepend(TOOLS)


def script(name: str) -> ModuleType:
    return importlib.import_module(name)


@pytest.mark.parametrize("file", sorted(TOOLS.glob("*.py")), ids=lambda file: file.name)
def test_there_is_a_test_for(file: Path) -> None:
    assert f"test_{file.stem}" in globals()


def conversations(word: str, count: int) -> list[dict[str, Any]]:
    rows = []
    for number in range(count):
        name = f"{word}{number}"
        messages = [{**m, "content": m["content"].format(name, number)} for m in CONVERSATION]
        rows.append(
            {
                "id": name, "messages": json.dumps(messages), "tools": None, "source": word,
                "license": "CC0",
            }
        )  # fmt: skip
    return rows


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What tools/demo_data.py reads, a few rows of each."""
    home = tmp_path_factory.mktemp("published")
    schema = pa.schema([(n, pa.string()) for n in ("id", "messages", "tools", "source", "license")])
    for name in ("reasoning", "tools", "general"):
        table = pa.Table.from_pylist(conversations(name, 30), schema=schema)
        pq.write_table(table, home / f"{name}.parquet")
    sources = ("python3.11-doc", "rust-std-api", "rust-books", "sqlite3-doc", "postgresql-15-doc")
    page = "\n\n".join(
        f"Paragraph {part} of {{}} says in many words what nobody has asked about {{}} and {part}."
        for part in range(40)
    )
    docs = [
        {"text": page.format(*[f"{source} {i}"] * 80), "source": source, "license": "PSF"}
        for i in range(13)
        for source in sources
    ]
    pq.write_table(pa.Table.from_pylist(docs), home / "docs.parquet")
    return home


@pytest.fixture(scope="module")
def made(published: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Any]:
    """Work folder, packs and report of one small run of tools/demo_data.py."""
    home = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(TOOLS)
        report = script("demo_data").main(
            [
                "--data", str(published), "--packs", str(home / "packs"),
                "--out", str(home / "work"), "--vocab-size", "400",
                "--rows", "4", "0", "12",
            ]
        )  # fmt: skip
    return home / "work", home / "packs", report


def test_demo_data(made: tuple[Path, Path, Any]) -> None:
    """Packs share no row with the training text; every count is that of what was written."""
    work, packs, report = made
    tokens = np.load(work / "tokens.npz")
    for domain, count in report["train_tokens"].items():
        assert tokens[f"{domain}/ids"].size == tokens[f"{domain}/lengths"].sum() == count > 0
    assert set(report["train_tokens"]) >= {"own", "skill", "agent", "docs"}
    texts: list[str] = []
    for name, pack in report["packs"].items():
        table = pq.read_table(packs / f"{name}.parquet")
        assert table.num_rows == pack["rows"] == sum(pack["sources"].values()) > 0
        assert 0 < pack["scored_share"] < 1
        texts += table["text"].to_pylist()
    assert len(set(texts)) == len(texts)
    assert json.loads((work / "data.json").read_text()) == report


def test_demo_reasoning() -> None:
    """Answers of the generators, checked by other means; written steps of reasoning-gym tasks."""
    reasoning = script("demo_reasoning")
    for name, generator in reasoning.OWN.items():
        first, again = (generator(random.Random(f"{name}3")) for _ in range(2))
        assert first == again
        assert [m["role"] for m in first] == ["user", "assistant", "assistant"]
    question, _, answer = reasoning.OWN["multiply"](random.Random(1))
    a, b = (int(word.rstrip("?.")) for word in question["content"].split() if word[0].isdigit())
    assert str(a * b) in answer["content"]
    steps, total = reasoning.GYM["chain_sum"]({"expression": "3 + 4 - 2"}, "5")
    assert (steps, total) == (["3 + 4 = 7.", "7 - 2 = 5."], "5")
    steps, _ = reasoning.GYM["prime_factorization"]({"number": 12, "factors": [2, 2, 3]}, "")
    assert steps[-2:] == ["3 / 3 = 1.", "1 is left, so all factors are found."]
    assert list(reasoning.gym_conversations("chain_sum", 0, 0)) == []


def test_demo_agents() -> None:
    """Every call names a declared tool and gives exactly its arguments."""
    agents = script("demo_agents")
    for scenario in agents.SCENARIOS:
        tools, messages = scenario(random.Random(5))
        known = {name: set(kinds) for name, _, kinds in tools}
        calls = [m for m in messages if m.get("recipient", "").startswith("functions.")]
        assert calls
        for call in calls:
            name = call["recipient"].removeprefix("functions.")
            assert set(json.loads(call["content"])) == known[name]
    assert agents.agent_conversation(random.Random(2)) == agents.agent_conversation(
        random.Random(2)
    )


def test_demo_model() -> None:
    """Rounding: what a code stands for is the nearest there is, and packs to the format's bytes."""
    model = script("demo_model")
    weight = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    codes, exponents = model.mxfp4_codes(weight)
    values = model.mxfp4_values(codes, exponents)
    assert torch.equal(model.mxfp4_values(*model.mxfp4_codes(values)), values)
    grid = torch.tensor([*model.E2M1, *(-v for v in model.E2M1)])
    steps = grid * torch.exp2(exponents)[..., None, None]
    best = (steps - weight.unflatten(-1, (-1, 32))[..., None]).abs().amin(-1)
    torch.testing.assert_close((values - weight).abs(), best.flatten(-2))
    blocks, scales = model.mxfp4_pack(codes, exponents)
    assert (blocks.shape, scales.shape) == ((3, 2, 16), (3, 2))
    assert torch.equal(blocks & 15, codes[..., 0::2].to(torch.uint8))


@pytest.fixture(scope="module")
def every_domain(made: tuple[Path, Path, Any]) -> Path:
    """The work folder with tokens of all domains: packs took every row of some, one is not here."""
    work, _, _ = made
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(TOOLS)
        shares = script("training").SHARES
    tokens = dict(np.load(work / "tokens.npz"))
    for domain in shares:
        for part in ("ids", "lengths"):
            tokens.setdefault(f"{domain}/{part}", tokens[f"own/{part}"])
    np.savez(work / "tokens.npz", **tokens)
    return work


LogpOf = Callable[[np.ndarray, np.ndarray], np.ndarray]  # ids and scored [B, S] -> ln p [T]


def check_perplexity(logp_of: LogpOf, work: Path, packs: Path, found: dict[str, float]) -> None:
    """A written checkpoint, loaded, has the perplexity that the script printed."""
    training = script("training")
    tokenizer = training.Tokenizer.from_file(str(work / "tokenizer.json"))
    assert set(found) == {file.stem for file in packs.glob("*.parquet")}
    for name, perplexity in found.items():
        texts = pq.read_table(packs / f"{name}.parquet")["text"].to_pylist()
        ids, scored = (x.numpy() for x in training.scored_stream(texts, tokenizer))
        ids, scored = (x[: len(x) // 64 * 64].reshape(-1, 64) for x in (ids, scored))
        scored[:, 0] = False
        assert np.exp(-logp_of(ids, scored).mean()) == pytest.approx(perplexity, rel=1e-4)


def by_the_package(model: Path) -> LogpOf:
    from eaft_prune.checkpoints.read import open_model
    from eaft_prune.core.types import Blocks
    from eaft_prune.engines.loading import load_files

    engine = load_files(open_model(model), options(device="cpu", dtype="float32"))

    def logp_of(ids: np.ndarray, scored: np.ndarray) -> np.ndarray:
        blocks = Blocks(
            "", 64, ids.astype(np.int32), scored, np.zeros_like(ids, np.int32),
            np.zeros(1, np.int32), ("",), "",
        )  # fmt: skip
        return engine.score(blocks, lambda done: None).logp_T.astype(np.float64)

    return logp_of


def by_transformers(path: Path) -> LogpOf:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)

    def logp_of(ids: np.ndarray, scored: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            logp = model(input_ids=torch.from_numpy(ids)).logits[:, :-1].double().log_softmax(-1)
        of_next = logp.gather(-1, torch.from_numpy(ids)[:, 1:, None])[..., 0].numpy()
        return np.asarray(of_next[scored[:, 1:]])

    return logp_of


def test_training(every_domain: Path) -> None:
    """The stream is whole passes over a domain, its rows in another order."""
    training = script("training")
    files = np.load(every_domain / "tokens.npz")
    own = files["own/ids"].astype(np.int64)
    # a little more than three passes, less than a row
    stream = training.mixture(every_domain / "tokens.npz", {"own": 1.0}, 3 * own.size + 1, 0, "cpu")
    drawn = stream.numpy().astype(np.int64)
    assert np.array_equal(np.bincount(drawn), 3 * np.bincount(own))
    assert not np.array_equal(drawn, np.tile(own, 3))
    assert sum(training.NATURAL.values()) == pytest.approx(1)


def test_train_demo_model(made: tuple[Path, Path, Any], every_domain: Path, tmp_path: Path) -> None:
    """Two steps; the written weights are those that were measured."""
    _, packs, _ = made
    found = script("train_demo_model").main(
        [
            "--data", str(every_domain), "--packs", str(packs), "--out", str(tmp_path / "model"),
            "--device", "cpu", "--lengths", "64", "--tokens", "700", "--batch", "4",
            "--seq-len", "64", "--quantise-from", "0.5", "--vocab-size", "400",
            "--hidden-size", "64", "--intermediate-size", "32", "--num-layers", "2",
            "--num-experts", "8", "--top-k", "2", "--num-heads", "4", "--num-kv-heads", "2",
            "--head-dim", "16", "--sliding-window", "16",
        ]
    )  # fmt: skip
    check_perplexity(by_the_package(tmp_path / "model"), every_domain, packs, found[64])


SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32,
    "num_hidden_layers": 2, "num_experts": 8, "n_routed_experts": 8, "num_experts_per_tok": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 400,
}  # fmt: skip
SMALL_DEMO = {
    "vocab_size": 400, "hidden_size": 64, "intermediate_size": 32, "num_layers": 2,
    "num_experts": 8, "top_k": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16,
    "sliding_window": 16,
}  # fmt: skip


def recipe(name: str, folder: Path) -> Path:
    """One of the lab, its sizes and its training made small."""
    recipe = json.loads((TOOLS / "lab" / f"{name}.json").read_text())
    part, sizes = ("demo_model", SMALL_DEMO) if name == "gpt_oss" else ("config", SMALL)
    known = sizes if name == "gpt_oss" else recipe[part].keys() & sizes.keys()
    recipe[part] |= {key: sizes[key] for key in known}
    recipe["train"] |= {"tokens": 900, "batch": 4, "seq_len": 64}
    (folder / f"{name}.json").write_text(json.dumps(recipe))
    return folder / f"{name}.json"


@pytest.mark.parametrize("name", sorted(file.stem for file in TOOLS.glob("lab/*.json")))
def test_train_lab_model(
    name: str, made: tuple[Path, Path, Any], every_domain: Path, tmp_path: Path
) -> None:
    """Every recipe at a small size; the written weights are those that were measured."""
    _, packs, _ = made
    found = script("train_lab_model").main(
        [
            str(recipe(name, tmp_path)), "--data", str(every_domain), "--packs", str(packs),
            "--out", str(tmp_path / "model"), "--device", "cpu", "--lengths", "64",
        ]
    )  # fmt: skip
    read = by_the_package if name == "gpt_oss" else by_transformers
    check_perplexity(read(tmp_path / "model"), every_domain, packs, found[64])


def test_experts_of_the_lab_are_those_of_transformers() -> None:
    """Outputs and gradients are those of transformers' own loop over experts."""
    from transformers import AutoConfig, AutoModelForCausalLM

    lab = script("train_lab_model")
    lab.ALL_EXPERTS_FUNCTIONS.register("lab", lab.experts_forward)
    config = AutoConfig.for_model("qwen3_moe", **SMALL, initializer_range=0.5)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    ids = torch.randint(0, 400, (2, 16))
    found = {}
    for name in ("eager", "lab"):
        model.config._experts_implementation = name
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        found[name] = [loss.detach(), *(p.grad.clone() for p in model.parameters())]
    torch.testing.assert_close(found["lab"], found["eager"], rtol=1e-4, atol=1e-6)


def test_correction_biases_even_the_load(every_domain: Path) -> None:
    """A step raises the bias of experts with less than the mean load, and lowers it of others."""
    lab = script("train_lab_model")
    config = json.loads((TOOLS / "lab" / "glm4_moe.json").read_text())["config"]
    small = {key: SMALL[key] for key in config.keys() & SMALL.keys()}
    schedule = lab.LabSchedule(tokens=256, batch=2, seq_len=64, bias_rate=0.1, lr=0.0)
    stream = torch.randint(0, 400, (256,), generator=torch.Generator().manual_seed(0))
    model = lab.train(schedule, config | small, stream)
    (router,) = lab.routers_of(model)
    chosen: list[torch.Tensor] = []
    router.get_buffer(lab.BIAS).zero_()
    router.register_forward_hook(lambda module, args, out: chosen.append(out[2].flatten()))
    model(input_ids=stream[:128].view(2, 64))
    counts = torch.bincount(torch.cat(chosen), minlength=8).float()
    assert counts.min() < counts.mean() < counts.max()
    expected = 0.1 * (counts.mean() - counts).sign()
    again = lab.train(schedule, config | small, stream)
    (router,) = lab.routers_of(again)
    torch.testing.assert_close(router.get_buffer(lab.BIAS), expected)


def test_notebook() -> None:
    cells = [
        {"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": ["a = 1\n", "a"]},
        {"cell_type": "markdown", "metadata": {}, "source": ["text"]},
        {"cell_type": "code", "metadata": {}, "source": ["print(a)\n", "b = a"]},
    ]
    done = script("notebook").executed({"cells": cells, "nbformat": 4}, {"a": 2})
    first, text, second = done["cells"]
    assert first["outputs"][0]["data"] == {"text/plain": "1"}
    assert text == cells[1]
    assert second["outputs"] == [{"output_type": "stream", "name": "stdout", "text": "2\n"}]
