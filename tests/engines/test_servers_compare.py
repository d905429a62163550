"""What servers tell of likeliest tokens, and what they write, against transformers' own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import tiny
from support.engines import options
from support.sglang_standin import StandIn, eager_forward, serving
from support.vllm_standin import VllmStandIn

from eaft_prune.checkpoints.read import open_model
from eaft_prune.config import EngineSettings
from eaft_prune.core.generation import Decoding
from eaft_prune.core.types import Blocks, UserError
from eaft_prune.engines.base import EngineOptions
from eaft_prune.engines.registry import engine_kind

Make = Callable[..., Blocks]
VOCAB = 300
PROMPTS = [[5, 9, 30], list(range(40, 75)), [7]]


def nothing(done: int) -> None:
    pass


@pytest.fixture(scope="module")
def forward(checkpoint: Path) -> Any:
    return eager_forward(tiny.eager_model(checkpoint).requires_grad_(False))


@pytest.fixture(params=["vllm", "sglang", "sglang, flat"])
def server(request: pytest.FixtureRequest, checkpoint: Path, forward: Any) -> Iterator[StandIn]:
    vllm = request.param == "vllm"
    own = VllmStandIn(str(checkpoint), forward) if vllm else StandIn(0, str(checkpoint), forward)
    if isinstance(own, VllmStandIn):
        own.max_logprobs = VOCAB
    own.flat = request.param == "sglang, flat"
    with serving(own) as started:
        yield started


def served(server: StandIn, checkpoint: Path) -> Any:
    name = "vllm" if isinstance(server, VllmStandIn) else "sglang"
    settings = EngineSettings(name=name, base_url=server.url, batch_blocks=2, retries=0)
    ours = EngineOptions(settings, options().runtime, 20, VOCAB)
    return engine_kind(name).open(ours, open_model(checkpoint), 2, Path("unused"))


def test_likeliest_tokens_are_those_of_the_transformers_engine(
    server: StandIn, checkpoint: Path, engine: Any, make_blocks: Make
) -> None:
    blocks = make_blocks(5, 24, share=0.2)
    client = served(server, checkpoint)
    for k in (3, 64, 1000):  # fewer than entropy takes, more, and more than there are
        scores, found = client.likeliest(blocks, k, nothing)
        plain, expected = engine.likeliest(blocks, k, nothing)
        assert found.ids_TK.dtype == expected.ids_TK.dtype
        assert np.mean(found.ids_TK == expected.ids_TK) > 0.99  # as likely ones may change places
        np.testing.assert_allclose(found.logp_TK, expected.logp_TK, atol=0.01)
        np.testing.assert_allclose(found.rest_T, expected.rest_T, atol=0.05)
        np.testing.assert_allclose(scores.logp_T, plain.logp_T, atol=1e-5)
        np.testing.assert_allclose(scores.entropy_T, plain.entropy_T, atol=1e-5)


def test_divergence_is_that_of_the_transformers_engine(
    server: StandIn,
    checkpoint: Path,
    engine: Any,
    load: Any,
    make_blocks: Make,
    tmp_path: Path,
) -> None:
    """To the base's K likeliest tokens: equal where the K likeliest of the other hold them."""
    blocks = make_blocks(5, 24, share=0.5)
    base = load(tiny.write_checkpoint(tmp_path / "base", seed=1))
    client = served(server, checkpoint)
    for k in (VOCAB, 64):
        _, of_base = base.likeliest(blocks, k, nothing)
        scores, found = client.diverge(blocks, of_base, nothing)
        plain, expected = engine.diverge(blocks, of_base, nothing)
        np.testing.assert_allclose(scores.logp_T, plain.logp_T, atol=1e-5)
        assert found.same_top_T.tolist() == expected.same_top_T.tolist()
        if k == VOCAB:
            np.testing.assert_allclose(found.kl_T, expected.kl_T, rtol=1e-3)
            continue
        assert (found.kl_T <= expected.kl_T * 1.001).all()
        assert found.kl_T.mean() > 0.5 * expected.kl_T.mean()
    _, own = client.likeliest(blocks, 64, nothing)
    _, to_itself = client.diverge(blocks, own, nothing)
    assert not to_itself.kl_T.any()
    assert to_itself.same_top_T.all()


def test_writing_ends_at_our_stops_alone(server: StandIn, checkpoint: Path, engine: Any) -> None:
    """Of one token and of two, which no server knows, though the server has an EOS of its own."""
    whole, _ = engine.generate(PROMPTS, Decoding(8, ()), 0, nothing)
    stops = ((whole[1][4],), tuple(whole[2][5:7]))
    server.eos = whole[0][2]
    client, told = served(server, checkpoint), list[int]()
    for how in (Decoding(8, ()), Decoding(8, stops)):
        told.clear()
        assert client.generate(PROMPTS, how, 0, told.append) == engine.generate(
            PROMPTS, how, 0, nothing
        )
        assert sum(told) == 3 * 8


def test_sglang_draws_only_what_it_repeats(checkpoint: Path, forward: Any) -> None:
    with serving(StandIn(0, str(checkpoint), forward)) as server:
        drawn = Decoding(4, (), seed=3, temperature=0.5)
        with pytest.raises(UserError, match="--enable-deterministic-inference"):
            served(server, checkpoint).generate(PROMPTS, drawn, 0, nothing)
        assert not server.requests
        server.info["enable_deterministic_inference"] = True
        served(server, checkpoint).generate(PROMPTS, drawn, 7, nothing)
        asked = [body["sampling_params"] for body in server.requests]
        assert {one["temperature"] for one in asked} == {0.5}
        seeds = {one["sampling_seed"] for one in asked}
        assert len(seeds) == 3
        assert all(0 <= seed < 2**31 for seed in seeds)
