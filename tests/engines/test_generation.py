"""Generation with cache, padding and our experts against transformers' own generate."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support import tiny
from support.engines import options

from eaft_prune.checkpoints.read import open_model
from eaft_prune.core.generation import Decoding
from eaft_prune.core.types import KeepPlan
from eaft_prune.engines.loading import load_files
from eaft_prune.engines.transformers import TransformersEngine

PROMPTS = [[5, 9, 30], list(range(40, 75)), [7], [100, 3, 50, 51, 52, 9]]  # one past the window


def nothing(done: int) -> None:
    pass


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_checkpoint(tmp_path_factory.mktemp("generation") / "model")


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> TransformersEngine:
    return load_files(open_model(checkpoint), options(device="cpu", batch_tokens=64))


def own(checkpoint: Path, prompt: list[int], new: int) -> list[int]:
    """Greedy, alone, without a cache or padding: the likeliest token of each full forward."""
    model, ids = tiny.eager_model(checkpoint), list(prompt)
    with torch.no_grad():
        for _ in range(new):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_greedy_is_that_of_each_prompt_alone(checkpoint: Path, engine: TransformersEngine) -> None:
    told: list[int] = []
    written, ended = engine.generate(PROMPTS, Decoding(20, ()), 0, told.append)
    assert written == [own(checkpoint, prompt, 20) for prompt in PROMPTS]
    assert ended == [False] * 4
    assert sum(told) == 4 * 20
    # and what scores blocks is as it was
    ours = engine.model.config._attn_implementation
    assert ours == "eaft_sink_attention"


def test_it_ends_at_a_stop(engine: TransformersEngine) -> None:
    whole, _ = engine.generate(PROMPTS, Decoding(20, ()), 0, nothing)
    one, turn = whole[1][4], tuple(whole[2][6:8])
    told: list[int] = []
    written, ended = engine.generate(PROMPTS, Decoding(20, ((one,), turn)), 0, told.append)
    assert sum(told) == 4 * 20  # a bar that ends
    for some, found, stopped in zip(whole, written, ended, strict=True):
        at = [i for i in range(20) if some[i] == one or tuple(some[i - 1 : i + 1]) == turn]
        assert stopped == bool(at)
        if not at:
            assert found == some
        else:  # a token ends it, another's turn is left out
            assert found == (some[: at[0] + 1] if some[at[0]] == one else some[: at[0] - 1])
    assert any(ended)


def test_masked_is_written_by_the_kept_experts(engine: TransformersEngine) -> None:
    plain, _ = engine.generate(PROMPTS, Decoding(20, ()), 0, nothing)
    with engine.masked(KeepPlan(((0, 1, 2),) * 2, 8)):
        masked, _ = engine.generate(PROMPTS, Decoding(20, ()), 0, nothing)
    assert masked != plain
    assert engine.generate(PROMPTS, Decoding(20, ()), 0, nothing)[0] == plain


def test_draws_follow_the_softmax_and_depend_on_the_prompts_number(
    checkpoint: Path, engine: TransformersEngine
) -> None:
    how = Decoding(1, (), seed=3, temperature=0.7)
    drawn = [engine.generate([[5, 9, 30]] * 100, how, 100 * i, nothing)[0] for i in range(20)]
    tokens = np.array([some[0] for part in drawn for some in part])
    with torch.no_grad():
        logits = tiny.eager_model(checkpoint)(torch.tensor([[5, 9, 30]])).logits[0, -1].double()
    p = torch.softmax(logits / 0.7, -1).numpy()
    top = np.argsort(-p)[:8]
    for token in top:
        error = np.sqrt(p[token] * (1 - p[token]) / 2000)
        assert abs(np.mean(tokens == token) - p[token]) < 4.5 * error
    # numbered alike, whatever the batch
    assert engine.generate([[5, 9, 30]] * 3, how, 50, nothing)[0] == drawn[0][50:53]
