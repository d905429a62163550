"""The vLLM client against a stand-in, and against vLLM itself where it is installed."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import tiny
from support.engines import options
from support.sglang_standin import Json, eager_forward, serving
from support.vllm_standin import VllmStandIn

from eaft_prune.checkpoints.read import open_model
from eaft_prune.config import EngineSettings
from eaft_prune.core.generation import Decoding
from eaft_prune.core.types import Blocks, UserError
from eaft_prune.engines.base import EngineOptions
from eaft_prune.engines.loading import load_files
from eaft_prune.engines.registry import VLLM
from eaft_prune.engines.vllm.engine import VllmEngine
from eaft_prune.engines.vllm.serving import serve

Make = Callable[..., Blocks]
PROMPTS = [[5, 9, 30], list(range(40, 75)), [7]]


def nothing(done: int) -> None:
    pass


@pytest.fixture(scope="module")
def server(checkpoint: Path) -> Iterator[VllmStandIn]:
    model = tiny.eager_model(checkpoint).requires_grad_(False)
    with serving(VllmStandIn(str(checkpoint), eager_forward(model))) as started:
        yield started


@pytest.fixture
def fresh(server: VllmStandIn) -> Iterator[VllmStandIn]:
    server.requests.clear()
    yield server
    server.fault = lambda handler, number, answers: False


def how(url: str, **changes: Any) -> EngineSettings:
    values = {"retries": 2, "backoff_s": 0.001, "batch_blocks": 2, **changes}
    return EngineSettings(name="vllm", base_url=url, **values)


def client(server: VllmStandIn, checkpoint: Path) -> VllmEngine:
    return serve(asked(server.url), open_model(checkpoint), 2, Path("unused"))


def asked(url: str, **changes: Any) -> EngineOptions:
    ours = options()
    return EngineOptions(how(url, **changes), ours.runtime, ours.entropy_top_k)


def test_scores_are_those_of_the_transformers_engine(
    fresh: VllmStandIn, checkpoint: Path, engine: Any, make_blocks: Make
) -> None:
    """Blocks whose first scored token lies anywhere, and one without any."""
    blocks = make_blocks(7, 24, share=0.2)
    blocks.scored_BS[3] = False
    done: list[int] = []
    ours = client(fresh, checkpoint).score(blocks, done.append)
    expected = engine.score(blocks, nothing)
    np.testing.assert_allclose(ours.logp_T, expected.logp_T, atol=1e-5)
    np.testing.assert_allclose(ours.entropy_T, expected.entropy_T, atol=1e-5)
    assert ours.block_T.tolist() == expected.block_T.tolist()
    assert sum(done) == blocks.ids_BS.size
    assert sum(len(body["prompt"]) for body in fresh.requests) == 6


def test_it_writes_what_the_transformers_engine_writes(
    fresh: VllmStandIn, checkpoint: Path, engine: Any
) -> None:
    """Stops of one token and of two, which no server knows, end it at the same place."""
    whole, _ = engine.generate(PROMPTS, Decoding(8, ()), 0, nothing)
    stops = ((whole[1][4],), tuple(whole[2][5:7]))
    writer, told = client(fresh, checkpoint), list[int]()
    for asked_for in (Decoding(8, ()), Decoding(8, stops)):
        told.clear()
        written = writer.generate(PROMPTS, asked_for, 0, told.append)
        assert written == engine.generate(PROMPTS, asked_for, 0, nothing)
        assert sum(told) == 3 * 8


def own(choice: Json) -> Json:
    """What the last prompt position says of the prompt's own token."""
    row = choice["prompt_logprobs"][-1]
    found: Json = row[str(choice["prompt_token_ids"][-1])]
    return found


WRONG: dict[str, tuple[Callable[[list[Json]], Any], str]] = {
    "a prompt short": (lambda c: c.pop(), "1 choices for 2 prompts"),
    "another prompt": (lambda c: c[0]["prompt_token_ids"].append(1), "other token ids"),
    "a row short": (lambda c: c[0]["prompt_logprobs"].pop(), "11 of 12 prompt log-probs"),
    "not its token": (lambda c: c[0]["prompt_logprobs"][-1].clear(), "not an answer"),
    "a top short": (lambda c: c[0]["prompt_logprobs"][-1].popitem(), "top log-probs, not 20"),
    "never": (lambda c: own(c[0]).update(logprob=-9999.0), "a probability of 0"),
    "null": (lambda c: own(c[0]).update(logprob=None), "not an answer"),
    "above 0": (lambda c: own(c[0]).update(logprob=0.5), "above 0"),
    "no log-probs": (lambda c: c[0].pop("prompt_logprobs"), "not an answer"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_answer_is_an_error(
    fresh: VllmStandIn, checkpoint: Path, make_blocks: Make, what: str
) -> None:
    change, message = WRONG[what]

    def fault(handler: Any, number: int, choices: list[Json]) -> bool:
        change(choices)
        return False

    fresh.fault = fault
    with pytest.raises(UserError, match=message):
        client(fresh, checkpoint).score(make_blocks(2, 12, share=0.9), nothing)
    assert len(fresh.requests) == 1  # asking again would not cure it


def test_limits_and_model_are_asked_beforehand(
    fresh: VllmStandIn, checkpoint: Path, tmp_path: Path
) -> None:
    VLLM.check(asked(fresh.url), 63, checkpoint)
    with pytest.raises(UserError, match="--max-model-len 65"):
        VLLM.check(asked(fresh.url), 64, checkpoint)
    with pytest.raises(UserError, match=f"start it with --model {tmp_path}"):
        VLLM.check(asked(fresh.url), 63, tmp_path)
    fresh.max_logprobs = 19
    try:
        with pytest.raises(UserError, match=r"greater than max.*--max-logprobs 20"):
            VLLM.check(asked(fresh.url), 63, checkpoint)
        with pytest.raises(UserError, match=r"--max-logprobs 64.*eval.kl_top_k=null"):
            VLLM.check(replace(asked(fresh.url), kl_top_k=64), 63, checkpoint)
    finally:
        fresh.max_logprobs = 20


def test_a_server_that_is_not_there_is_told_at_once(checkpoint: Path) -> None:
    """With a patience of minutes in the settings: nobody waits for a server that is not there."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(UserError, match="Connection refused, asked once") as caught:
        VLLM.check(asked(url, retries=100, backoff_s=60), 8, checkpoint)
    assert "\n" not in str(caught.value)


PYTHON = os.environ.get("EAFT_VLLM_PYTHON")
ARGS = os.environ.get("EAFT_VLLM_ARGS", "--dtype float32 --gpu-memory-utilization 0.2").split()


@pytest.mark.server
@pytest.mark.process
@pytest.mark.skipif(PYTHON is None, reason="EAFT_VLLM_PYTHON names no interpreter with vllm")
def test_vllm_itself_scores_and_writes_as_transformers(make_blocks: Make, tmp_path: Path) -> None:
    """A random qwen3_moe in float32, heads of 32 as vLLM's attention on CPUs wants."""
    model = tiny.write_moe(tmp_path / "model", "qwen3_moe", fused=False, head_dim=32)
    files = open_model(model)
    engine = load_files(files, options(device="cpu", dtype="float32"))
    settings = EngineSettings(
        name="vllm",
        python=PYTHON,
        args=(*ARGS, "--max-model-len", "256"),
        env={"VLLM_CPU_KVCACHE_SPACE": "1"},
        batch_blocks=3,
    )
    ours = EngineOptions(settings, options().runtime, 20, 64)
    served = serve(ours, files, 2, tmp_path / "log")
    blocks = make_blocks(5, 100)
    ours, expected = served.score(blocks, nothing), engine.score(blocks, nothing)
    apart = np.abs(ours.logp_T - expected.logp_T)
    print(f"{len(apart)} tokens: |d log p| mean {apart.mean():.1e}, max {apart.max():.1e}")
    np.testing.assert_allclose(ours.logp_T, expected.logp_T, atol=1e-4)
    np.testing.assert_allclose(ours.entropy_T, expected.entropy_T, atol=1e-4)
    whole = engine.generate(PROMPTS, Decoding(20, ()), 0, nothing)
    assert served.generate(PROMPTS, Decoding(20, ()), 0, nothing) == whole
    stops = ((whole[0][1][4],), tuple(whole[0][2][5:7]))
    stopped = Decoding(20, stops)
    assert served.generate(PROMPTS, stopped, 0, nothing) == engine.generate(
        PROMPTS, stopped, 0, nothing
    )
    drawn = Decoding(20, (), seed=1)
    first, again = (served.generate(PROMPTS, drawn, 0, nothing) for _ in range(2))
    assert first == again != whole
