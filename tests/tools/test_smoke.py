"""Every file of tools/ runs, at a size that takes a second or two."""

from __future__ import annotations

import importlib
import json
import random
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


def test_train_demo_model(made: tuple[Path, Path, Any], tmp_path: Path) -> None:
    """Two steps; the package finds the perplexity in the written checkpoint that was printed."""
    from eaft_prune.checkpoints.read import open_model
    from eaft_prune.core.types import Blocks
    from eaft_prune.engines.loading import load_files

    work, packs, _ = made
    training = script("train_demo_model")
    tokens = dict(np.load(work / "tokens.npz"))
    for domain in training.SHARES:  # of some the packs took every row; reasoning-gym is not here
        for part in ("ids", "lengths"):
            tokens.setdefault(f"{domain}/{part}", tokens[f"own/{part}"])
    np.savez(work / "tokens.npz", **tokens)
    found = training.main(
        [
            "--data", str(work), "--packs", str(packs), "--out", str(tmp_path / "model"),
            "--device", "cpu", "--lengths", "64", "--tokens", "700", "--batch", "4",
            "--seq-len", "64", "--quantise-from", "0.5", "--vocab-size", "400",
            "--hidden-size", "64", "--intermediate-size", "32", "--num-layers", "2",
            "--num-experts", "8", "--top-k", "2", "--num-heads", "4", "--num-kv-heads", "2",
            "--head-dim", "16", "--sliding-window", "16",
        ]
    )  # fmt: skip
    files = open_model(tmp_path / "model")
    engine = load_files(files, options(device="cpu", dtype="float32"))
    tokenizer = training.Tokenizer.from_file(str(work / "tokenizer.json"))
    assert set(found[64]) == {file.stem for file in packs.glob("*.parquet")}
    for name, perplexity in found[64].items():
        texts = pq.read_table(packs / f"{name}.parquet")["text"].to_pylist()
        ids, scored = (x.numpy() for x in training.scored_stream(texts, tokenizer))
        ids, scored = (x[: len(x) // 64 * 64].reshape(-1, 64) for x in (ids, scored))
        scored[:, 0] = False
        blocks = Blocks(
            name, 64, ids.astype(np.int32), scored, np.zeros_like(ids, np.int32),
            np.zeros(1, np.int32), (name,), "",
        )  # fmt: skip
        logp = engine.score(blocks, lambda done: None).logp_T.astype(np.float64)
        assert np.exp(-logp.mean()) == pytest.approx(perplexity, rel=1e-4)
