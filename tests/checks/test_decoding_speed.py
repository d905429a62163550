"""The decode benchmark: its sums by simulation, its client against a stand-in server."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from support import tiny
from support.runs import World
from support.sglang_standin import Json, StandIn, bigram_forward, eager_forward, serving

from eaft_prune.checks.decoding_speed import Point, ladder, max_stable_batch, point, summary
from eaft_prune.engines.decoding import DecodeError, HttpDecoder, Prompts, Stream
from eaft_prune.engines.servers.http import HttpClient

pytest_plugins = ("support.worlds",)

RECORDED = Path(__file__).parents[1] / "data" / "sglang_0_5_20.json"


class Simulated:
    """A decoder of known speed: 0.5 s to the first token, then 0.01 s a token for everybody."""

    facts: Mapping[str, Any] = {}

    def __init__(self, capacity: int | None, breaks_at: int) -> None:
        self.capacity = capacity
        self.breaks_at = breaks_at

    def decode(self, prompts: Prompts, new_tokens: int) -> list[Stream]:
        if len(prompts) >= self.breaks_at:
            raise DecodeError("no memory left")
        return [Stream(0.5, 0.5 + 0.01 * (new_tokens - 1), new_tokens)] * len(prompts)


def climb(decoder: Simulated, side: str = "base", repeat: int = 0) -> list[Point | str]:
    return list(ladder(decoder, side, (4, 1, 2), 51, repeat, lambda batch: [[1] * 9] * batch))


def test_rates_of_a_simulated_decoder() -> None:
    for batch, found in zip((1, 2, 4), climb(Simulated(None, 99)), strict=True):
        assert isinstance(found, Point)
        assert (found.batch, found.new_tokens, found.ttft_s) == (batch, 51, 0.5)
        assert found.total_tokens_s == pytest.approx(batch * 51 / 1.0)  # 0.5 s + 50 x 0.01 s
        assert found.stream_tokens_s == pytest.approx(100)


def test_the_ladder_ends_where_memory_does() -> None:
    *decoded, why = climb(Simulated(capacity=2 * (9 + 51), breaks_at=99))
    assert [p.batch for p in decoded if isinstance(p, Point)] == [1, 2]
    assert why == "batch 4 needs 240 of 120 tokens of memory"
    *decoded, why = climb(Simulated(None, breaks_at=2))
    assert len(decoded) == 1
    assert why == "batch 2 failed: no memory left"


def test_medians_ratios_and_the_largest_stable_batch() -> None:
    speeds = {"base": (1.0, 5.0, 2.0), "candidate": (3.0, 9.0, 4.0)}
    points = [
        point(side, batch, repeat, [Stream(0.1, 10 / speed, 10)] * batch)
        for repeat in range(3)
        for side, each in speeds.items()
        for speed in [each[repeat]]
        for batch in ((1, 2, 4) if repeat or side == "base" else (1, 2))
    ]
    rows = summary(points)
    assert [(r.side, r.batch, r.repeats) for r in rows if r.side == "candidate"] == [
        ("candidate", 1, 3), ("candidate", 2, 3), ("candidate", 4, 2),
    ]  # fmt: skip
    by = {(row.side, row.batch): row for row in rows}
    assert by["base", 2].total_tokens_s == pytest.approx(4.0)  # median speed 2, two streams
    assert by["candidate", 2].ratio == pytest.approx(2.0)
    assert by["base", 2].ratio == 1.0
    assert max_stable_batch(rows, 3) == {"base": {"10": 4}, "candidate": {"10": 2}}


@pytest.fixture(scope="module")
def server() -> Iterator[StandIn]:
    with serving(StandIn(0, "somewhere", bigram_forward)) as started:
        yield started


@pytest.mark.parametrize("api", ["sglang", "openai"])
def test_streams_are_counted_and_timed(server: StandIn, api: Any) -> None:
    server.requests.clear()
    streams = HttpDecoder(HttpClient(server.url), api).decode([[1, 2], [3, 4], [5, 6]], 7)
    assert [stream.tokens for stream in streams] == [7, 7, 7]
    assert all(0 < stream.first_s <= stream.end_s for stream in streams)
    key = "prompt" if api == "openai" else "input_ids"
    assert sorted(body[key] for body in server.requests) == [[1, 2], [3, 4], [5, 6]]
    for body in server.requests:
        assert body["stream"]
        assert (body if api == "openai" else body["sampling_params"])["ignore_eos"]


def written(text: bytes) -> Any:
    def fault(handler: Any, number: int, answers: list[Json]) -> bool:
        handler.wfile.write(text)
        return True

    return fault


@pytest.mark.parametrize(("api", "stream"), [("sglang", "stream"), ("openai", "stream_openai")])
def test_streams_of_a_real_server_are_read(server: StandIn, api: Any, stream: str) -> None:
    """Recorded from sglang 0.5.20 on a CPU: four new tokens."""
    decoder = HttpDecoder(HttpClient(server.url), api)
    server.fault = written(json.loads(RECORDED.read_text())[stream].encode())
    try:
        assert [s.tokens for s in decoder.decode([[1, 2]], 4)] == [4]
        with pytest.raises(DecodeError, match="4 of 5 new tokens"):
            decoder.decode([[1, 2]], 5)
        for text, message in (
            (b"", "stream ended with"),
            (b'data: {"error": {"message": "out of memory"}}\n\n', "out of memory"),
            (b"data: {\n\n", "stream ended with"),
        ):
            server.fault = written(text)
            with pytest.raises(DecodeError, match=message):
                decoder.decode([[1, 2]], 4)
    finally:
        server.fault = lambda handler, number, answers: False


QUICK = (
    "task=decode_bench",
    "decode_bench.prompt_tokens=4",
    "decode_bench.new_tokens=[3,5]",
    "decode_bench.repeats=2",
    "decode_bench.batch_sizes=[1,2]",
    "decode_bench.warmup_tokens=2",
)


def test_a_checkpoint_is_timed_against_another_in_this_process(world: World) -> None:
    done = world.run(*QUICK, f"decode_bench.candidate={world.model}")
    assert done.code == 0, done.out + done.err
    (file,) = (p for p in done.cwd.rglob("decode_bench.json") if "artifacts" not in p.parts)
    found = json.loads(file.read_text())
    assert [(r["side"], r["new_tokens"], r["batch"], r["repeats"]) for r in found["rows"]] == [
        (side, new, batch, 2)
        for side in ("base", "candidate")
        for new in (3, 5)
        for batch in (1, 2)
    ]
    order = [(p["repeat"], p["side"]) for p in found["points"]]
    assert list(dict.fromkeys(order)) == [
        (0, "base"), (0, "candidate"), (1, "candidate"), (1, "base"),
    ]  # fmt: skip
    assert found["sides"]["base"]["digest"] == found["sides"]["candidate"]["digest"]
    assert found["sides"]["base"]["engine"] == "transformers"
    assert done.result["facts"]["max_stable_batch"]["base"] == {"3": 2, "5": 2}
    assert "Plotly" in file.with_name("decode_bench.html").read_text()


def test_what_is_timed_is_said_before_anything_takes_long(world: World) -> None:
    """Of the base alone, with a line for every batch that was decoded."""
    done = world.run(*QUICK)
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert lines[0].startswith("decoding 3, 5 new tokens in batches of 1, 2, 2 rounds: the base ")
    assert sum("tok/s" in line and line.startswith("base  ") for line in lines) >= 2 * 2 * 2


def test_two_servers_are_timed_until_memory_ends(world: World, server: StandIn) -> None:
    server.info["max_total_num_tokens"] = 17  # two streams of 4 + 3 tokens, one of 4 + 5
    done = world.run(
        *QUICK, f"decode_bench.base={server.url}", f"decode_bench.candidate={server.url}/"
    )
    assert done.code == 0, done.out + done.err
    facts = done.result["facts"]
    assert facts["max_stable_batch"] == {
        "base": {"3": 2, "5": 1}, "candidate": {"3": 2, "5": 1},
    }  # fmt: skip
    assert facts["ended"]["base/5"] == "batch 2 needs 18 of 17 tokens of memory"
    assert facts["decode"]["candidate"]["5"]["batch1"]["ratio"] > 0


def test_candidate_arguments_need_a_launched_server(world: World) -> None:
    assert "give engine.python" in world.run(*QUICK, "decode_bench.candidate_args=[--x]").failed()


def test_engine_parity_of_a_server_that_computes_the_same(world: World) -> None:
    model = tiny.eager_model(world.model).requires_grad_(False)
    with serving(StandIn(0, str(world.model), eager_forward(model))) as same:
        done = world.run(
            "task=engine_parity", "engine=sglang", f"engine.base_url={same.url}",
            "eval.num_blocks=2",
        )  # fmt: skip
    assert done.code == 0, done.out + done.err
    found = done.result["facts"]["parity"]["UNION/64"]
    assert 0 < found["mean_dlogp"] <= found["max_dlogp"] < 1e-5
    assert 0 < found["mean_dentropy"] <= found["max_dentropy"] < 1e-5
    assert abs(found["dppl"]) < 1e-5
    assert found["tokens"] > 0
    assert "max dlnp" in done.out
