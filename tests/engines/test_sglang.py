"""The SGLang client against a stand-in server over transformers' own eager forward."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from support import tiny
from support.sglang_standin import Json, StandIn, eager_forward, serving

from eaft_prune.checkpoints.read import open_model
from eaft_prune.config import EngineSettings
from eaft_prune.core.types import Blocks, KeepPlan, UserError
from eaft_prune.engines.servers.http import HttpClient
from eaft_prune.engines.sglang.engine import SglangEngine
from eaft_prune.engines.sglang.server import Server, connect, normalised
from eaft_prune.engines.sglang.serving import serve

if TYPE_CHECKING:
    from eaft_prune.engines.transformers import TransformersEngine

Make = Callable[..., Blocks]


def nothing(done: int) -> None:
    pass


@pytest.fixture(scope="module")
def server(checkpoint: Path) -> Iterator[StandIn]:
    model = tiny.eager_model(checkpoint).requires_grad_(False)
    with serving(StandIn(0, str(checkpoint), eager_forward(model))) as started:
        yield started


@pytest.fixture
def fresh(server: StandIn) -> Iterator[StandIn]:
    """The same server with nothing asked of it and nothing wrong."""
    with server.lock:
        server.requests.clear()
    yield server
    server.flat = False
    server.fault = lambda handler, number, answers: False


def client(server: StandIn, checkpoint: Path, **settings: Any) -> SglangEngine:
    values = {"timeout_s": 20, "retries": 2, "backoff_s": 0.001, "batch_blocks": 2, **settings}
    engine = EngineSettings(name="sglang", base_url=server.url, **values)
    return serve(engine, open_model(checkpoint), 2, 20, Path("unused"))


@pytest.mark.parametrize("flat", [False, True])
def test_scores_are_those_of_the_transformers_engine(
    fresh: StandIn, checkpoint: Path, engine: TransformersEngine, make_blocks: Make, flat: bool
) -> None:
    """Blocks whose first scored token lies anywhere, and one without any."""
    blocks = make_blocks(7, 24, share=0.2)
    blocks.scored_BS[3] = False
    fresh.flat = flat
    done: list[int] = []
    ours = client(fresh, checkpoint).score(blocks, done.append)
    expected = engine.score(blocks, nothing)
    np.testing.assert_allclose(ours.logp_T, expected.logp_T, atol=1e-5)
    np.testing.assert_allclose(ours.entropy_T, expected.entropy_T, atol=1e-5)
    assert ours.block_T.tolist() == expected.block_T.tolist()
    assert sum(done) == blocks.ids_BS.size
    assert sum(len(body["input_ids"]) for body in fresh.requests) == 6


def test_results_keep_block_order_whoever_answers_first(
    fresh: StandIn, checkpoint: Path, engine: TransformersEngine, make_blocks: Make
) -> None:
    """The first block is answered after the other three."""
    blocks, others = make_blocks(4, 12), threading.Semaphore(0)
    start = int(blocks.scored_BS[0].argmax()) - 1
    first = int(blocks.ids_BS[0, start])

    def hold(handler: BaseHTTPRequestHandler, number: int, answers: list[Json]) -> bool:
        if answers[0]["meta_info"]["input_token_logprobs"][0][1] == first:
            assert all(others.acquire(timeout=20) for _ in range(3))
        else:
            others.release()
        return False

    fresh.fault = hold
    scores = client(fresh, checkpoint, batch_blocks=1, concurrency=4).score(blocks, nothing)
    np.testing.assert_allclose(scores.logp_T, engine.score(blocks, nothing).logp_T, atol=1e-5)


def spoil(change: Callable[[Json], None]) -> Callable[..., bool]:
    def fault(handler: BaseHTTPRequestHandler, number: int, answers: list[Json]) -> bool:
        change(answers[-1]["meta_info"])
        return False

    return fault


def _flatten(meta: Json, logp: float) -> None:
    """Every one of the likeliest tokens has the same log-prob, and the token itself less."""
    for row in meta["input_top_logprobs"][1:]:
        row[:] = [[logp, *entry[1:]] for entry in row]


def _drop(meta: Json, key: str, at: int) -> None:
    del meta[key][at]


WRONG: dict[str, tuple[Callable[[Json], None], str]] = {
    "a row short": (lambda m: _drop(m, "input_token_logprobs", -1), "of .* input log-probs"),
    "another id": (lambda m: m["input_token_logprobs"][1].__setitem__(1, 299), "other token ids"),
    "a null later": (lambda m: m["input_token_logprobs"][2].__setitem__(0, None), "null"),
    "text": (lambda m: m["input_token_logprobs"][2].__setitem__(0, "-1"), "null or infinite"),
    "above 0": (lambda m: m["input_token_logprobs"][2].__setitem__(0, 0.5), "above 0"),
    "a top row short": (lambda m: _drop(m, "input_top_logprobs", 1), "rows of top"),
    "a null top row": (lambda m: m["input_top_logprobs"].__setitem__(2, None), "rows of top"),
    "19 of 20": (lambda m: [r.pop() for r in m["input_top_logprobs"][1:]] and None, "top log-pr"),
    "ragged": (lambda m: _drop(m["input_top_logprobs"], 1, 0), "not an answer"),  # type: ignore[arg-type]
    "a null top": (lambda m: m["input_top_logprobs"][1][0].__setitem__(0, None), "null"),
    "top above 0": (lambda m: m["input_top_logprobs"][1][0].__setitem__(0, 0.5), "s above 0, or"),
    "top above 1": (lambda m: _flatten(m, -0.1), "sum to more than 1"),
    "huge": (lambda m: m["input_token_logprobs"][2].__setitem__(0, -(10**400)), "not an answer"),
    "no top": (lambda m: m.pop("input_top_logprobs"), "not an answer"),
    "no meta": (lambda m: m.clear(), "not an answer"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_answer_is_an_error(
    fresh: StandIn, checkpoint: Path, make_blocks: Make, what: str
) -> None:
    change, message = WRONG[what]
    fresh.fault = spoil(change)
    with pytest.raises(UserError, match=message):
        client(fresh, checkpoint).score(make_blocks(2, 12), nothing)
    assert len(fresh.requests) == 1  # asking again would not cure it


def test_a_sequence_short_is_an_error(fresh: StandIn, checkpoint: Path, make_blocks: Make) -> None:
    fresh.fault = lambda handler, number, answers: answers.pop() is None
    with pytest.raises(UserError, match="not an answer to what was asked"):
        client(fresh, checkpoint).score(make_blocks(2, 12), nothing)


def status(code: int) -> Callable[..., bool]:
    def fault(handler: Any, number: int, answers: list[Json]) -> bool:
        handler.reply({"error": "no memory left"}, code)
        return True

    return fault


def hang_up(handler: Any, number: int, answers: list[Json]) -> bool:
    handler.connection.shutdown(socket.SHUT_RDWR)
    return True


def cut(handler: Any, number: int, answers: list[Json]) -> bool:
    content = json.dumps(answers).encode()
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content[:-10])
    return True


def garbage(handler: Any, number: int, answers: list[Json]) -> bool:
    handler.send_response(200)
    handler.end_headers()
    handler.wfile.write(b"<html>proxy</html>")
    return True


PASSING: dict[str, tuple[Callable[..., bool], str]] = {
    "500": (status(500), "status 500: .*no memory left"),
    "503": (status(503), "status 503"),
    "429": (status(429), "status 429"),
    "hang up": (hang_up, "RemoteDisconnected|ConnectionReset"),
    "cut": (cut, "IncompleteRead"),
    "not JSON": (garbage, "not JSON: <html>"),
}


@pytest.mark.parametrize("what", PASSING)
def test_what_may_pass_is_tried_again_and_then_an_error(
    fresh: StandIn, checkpoint: Path, engine: TransformersEngine, make_blocks: Make, what: str
) -> None:
    fault, message = PASSING[what]
    blocks = make_blocks(2, 12)
    fresh.fault = lambda handler, number, answers: number <= 2 and fault(handler, number, answers)
    scores = client(fresh, checkpoint).score(blocks, nothing)
    np.testing.assert_allclose(scores.logp_T, engine.score(blocks, nothing).logp_T, atol=1e-5)
    assert len(fresh.requests) == 3
    fresh.fault = fault
    with pytest.raises(UserError, match=message) as caught:
        client(fresh, checkpoint).score(blocks, nothing)
    assert "3 times" in str(caught.value)
    assert len(fresh.requests) == 6


def test_a_refused_request_is_not_tried_again(
    fresh: StandIn, checkpoint: Path, make_blocks: Make
) -> None:
    fresh.fault = status(400)
    with pytest.raises(UserError, match=r"status 400: .*no memory left"):
        client(fresh, checkpoint).score(make_blocks(2, 12), nothing)
    assert len(fresh.requests) == 1


def test_a_server_that_never_answers_times_out(
    fresh: StandIn, checkpoint: Path, make_blocks: Make
) -> None:
    over = threading.Event()
    fresh.fault = lambda handler, number, answers: over.wait(20)
    try:
        with pytest.raises(UserError, match=r"no answer within 0.05 s, 2 times"):
            client(fresh, checkpoint, timeout_s=0.05, retries=1).score(make_blocks(2, 12), nothing)
    finally:
        over.set()


def test_one_failure_ends_the_requests_in_flight(
    fresh: StandIn, checkpoint: Path, make_blocks: Make
) -> None:
    """The first block is refused while the second hangs: nobody waits for the hanging one."""
    blocks, over = make_blocks(2, 12), threading.Event()
    second_in = threading.Event()
    second = int(blocks.ids_BS[1][int(blocks.scored_BS[1].argmax()) - 1])

    def fault(handler: Any, number: int, answers: list[Json]) -> bool:
        if answers[0]["meta_info"]["input_token_logprobs"][0][1] == second:
            second_in.set()
            over.wait(60)
            return True
        assert second_in.wait(20)
        return status(400)(handler, number, answers)

    fresh.fault = fault
    patient = client(fresh, checkpoint, batch_blocks=1, timeout_s=3600)
    try:
        with pytest.raises(UserError, match="status 400"):
            patient.score(blocks, nothing)
    finally:
        over.set()
    fresh.fault = lambda handler, number, answers: False
    assert len(patient.score(blocks, nothing)) == blocks.scored_tokens  # and it is good again


def test_death_midway_leaves_no_partial_scores(checkpoint: Path, make_blocks: Make) -> None:
    model = tiny.eager_model(checkpoint)
    with serving(StandIn(0, str(checkpoint), eager_forward(model))) as dying:

        def die(handler: BaseHTTPRequestHandler, number: int, answers: list[Json]) -> bool:
            if number == 2:
                dying.socket.close()  # no more connections
                return hang_up(handler, number, answers)
            return False

        dying.fault = die
        engine = client(dying, checkpoint, batch_blocks=1, concurrency=1)
        with pytest.raises(UserError, match=r"ConnectionRefused|ConnectionReset|RemoteDisc"):
            engine.score(make_blocks(4, 12), nothing)


@pytest.mark.parametrize("bad", [-1, 300])
def test_ids_outside_the_vocabulary_never_leave(
    fresh: StandIn, checkpoint: Path, make_blocks: Make, bad: int
) -> None:
    blocks = make_blocks(2, 12)
    blocks.ids_BS[1, 5] = bad
    with pytest.raises(UserError, match=r"leave the vocabulary of 300"):
        client(fresh, checkpoint).score(blocks, nothing)
    assert not fresh.requests


def test_profiling_and_masking_are_refused(
    fresh: StandIn, checkpoint: Path, make_blocks: Make
) -> None:
    engine = client(fresh, checkpoint)
    with pytest.raises(UserError, match="use engine=transformers"):
        engine.trace(make_blocks(1, 4), nothing)
    with pytest.raises(UserError, match="use engine=transformers"):
        engine.masked(KeepPlan(((0,),), 8))


def test_conditions_tell_servers_apart_by_what_matters(fresh: StandIn, checkpoint: Path) -> None:
    one = client(fresh, checkpoint).server
    same = normalised({**fresh.info, "port": 1, "random_seed": 5, "model_path": "other"})
    assert dict(one.args) == same
    assert dict(one.args) != normalised({**fresh.info, "attention_backend": "triton"})
    engine = client(fresh, checkpoint)
    two = replace(
        engine,
        server=replace(one, args={"json_model_override_args": '{"num_experts_per_tok": 1}'}),
    )
    assert (engine.conditions["top_k"], two.conditions["top_k"]) == (2, 1)
    assert json.loads(json.dumps(engine.conditions)) == engine.conditions


def test_another_model_behind_the_url_is_refused(fresh: StandIn, tmp_path: Path) -> None:
    other = tiny.write_checkpoint(tmp_path / "other")
    with pytest.raises(UserError, match="start it with --model-path"):
        client(fresh, other)


def test_no_server_at_all(checkpoint: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    settings = EngineSettings(name="sglang", base_url=url)
    with pytest.raises(UserError, match="Connection refused, asked once: is the server up"):
        serve(settings, open_model(checkpoint), 2, 20, Path("unused"))


@pytest.mark.parametrize("form", ["nested", "flat"])
def test_answers_of_a_real_server_are_read(fresh: StandIn, form: str) -> None:
    """Recorded from sglang 0.5.20 on a CPU; the file says how."""
    recorded = json.loads((Path(__file__).parents[1] / "data" / "sglang_0_5_20.json").read_text())
    ids = np.array(recorded["request"]["input_ids"], np.int32)
    starts = recorded["request"]["logprob_start_len"]
    scored = np.arange(ids.shape[1]) > np.array(starts)[:, None]
    scored[0, 3] = False
    zero = np.zeros_like(ids)
    blocks = Blocks("p", ids.shape[1], ids, scored, zero, np.zeros(1, np.int32), ("p",), "0")
    server = Server(
        HttpClient(fresh.url), "m", "0.5.20", normalised(recorded["server_info"]), None, None
    )

    def play(handler: Any, number: int, answers: list[Json]) -> bool:
        handler.reply(recorded[form])
        return True

    fresh.fault = play
    asked = recorded["request"]["top_logprobs_num"]
    how = EngineSettings(name="sglang", base_url=fresh.url, batch_blocks=2, concurrency=1)
    scores = SglangEngine(server, how, 300, 2, asked).score(blocks, nothing)
    assert fresh.requests[0] == {
        **recorded["request"],
        "return_flat_raw_top_logprobs": True,
        "return_flat_raw_top_logprobs_b64": True,
    }
    logp, entropy = [], []
    for b, t in np.argwhere(scored):
        meta, row = recorded["nested"][b]["meta_info"], t - starts[b]
        logp.append(meta["input_token_logprobs"][row][0])
        q = np.exp([value for value, _, _ in meta["input_top_logprobs"][row]])
        q /= q.sum()
        entropy.append(-(q * np.log(q)).sum() / np.log(asked))
    np.testing.assert_allclose(scores.logp_T, logp, atol=1e-6)
    np.testing.assert_allclose(scores.entropy_T, entropy, atol=1e-6)


def test_a_real_server_is_described(fresh: StandIn) -> None:
    recorded = json.loads((Path(__file__).parents[1] / "data" / "sglang_0_5_20.json").read_text())
    fresh_info, fresh_model = fresh.info, fresh.model
    try:
        fresh.info, fresh.model = recorded["server_info"], recorded["model_info"]
        server = connect(EngineSettings(name="sglang", base_url=fresh.url), fresh.url)
    finally:
        fresh.info, fresh.model = fresh_info, fresh_model
    assert (server.version, server.model_path, server.capacity) == ("0.5.20", "llama", 8192)
    assert server.args["attention_backend"] == "torch_native"
    assert server.overrides == {}
    assert not {"port", "model_path", "random_seed", "api_key", "startup_time"} & set(server.args)


def send(handler: Any, *lines: str) -> None:
    handler.wfile.write("".join(f"{line}\r\n" for line in ("HTTP/1.1 200 OK", *lines)).encode())


def endless(handler: Any, number: int, answers: list[Json]) -> bool:
    """Until the client hangs up; each way in which HTTP says where an answer ends."""
    how = ("X: y", "Content-Length: 1000000000000", "Transfer-Encoding: chunked")[number % 3]
    send(handler, how, "")
    part = b" " * 65536
    chunk = b"10000\r\n" + part + b"\r\n" if "chunked" in how else part
    with suppress(OSError):
        for _ in range(10_000):
            handler.wfile.write(chunk)
    return True


@pytest.mark.parametrize("kind", range(3))
def test_an_answer_larger_than_what_was_asked_is_not_read_to_its_end(
    fresh: StandIn, checkpoint: Path, make_blocks: Make, kind: int
) -> None:
    fresh.fault = lambda handler, number, answers: endless(handler, kind, answers)
    with pytest.raises(UserError, match=r"an answer of more than [\d,]+ bytes"):
        client(fresh, checkpoint).score(make_blocks(2, 12), nothing)
    assert len(fresh.requests) == 1


HEAD = "HTTP/1.1 200 OK\r\n"
DRIPPED = {
    "the status": "HTTP/1.1 " + " " * 300,
    "a header": HEAD + "X: " + "x" * 300,
    "a body of some length": HEAD + "Content-Length: 400\r\n\r\n" + " " * 300,
    "a body without a length": HEAD + "\r\n[" + " " * 300 + "]",
    "chunks": HEAD + "Transfer-Encoding: chunked\r\n\r\n" + "1\r\n \r\n" * 100,
}


@pytest.mark.parametrize("what", DRIPPED)
def test_an_answer_that_comes_byte_by_byte_is_given_up(
    fresh: StandIn, checkpoint: Path, make_blocks: Make, what: str
) -> None:
    """Each byte comes long before timeout_s, all of them long after it."""
    never = threading.Event()

    def drip(handler: Any, number: int, answers: list[Json]) -> bool:
        with suppress(OSError):
            for byte in DRIPPED[what].encode():
                handler.connection.sendall(bytes([byte]))
                never.wait(0.01)
        return True

    fresh.fault = drip
    with pytest.raises(UserError, match=r"no answer within 0.5 s, 2 times"):
        client(fresh, checkpoint, timeout_s=0.5, retries=1).score(make_blocks(2, 12), nothing)


FLAT_WRONG: dict[str, Any] = {
    "input_top_logprobs_val_flat_b64_dtype": ["O", "V9", "f8,(10000000,)f8", 3, None, "int32"],
    "input_top_logprobs_shape": [[-1, -1], [10**9, 10**9], "x", None, [], [10**30]],
    "input_top_logprobs_null_prefix": [0, "1", None, [1], 10**400],
    "input_top_logprobs_val_flat_b64": ["", "!", 5, None, "AAAA"],
    "input_token_logprobs": [None, 5, {}, [[]] * 12, [None] * 12],
}


@pytest.mark.parametrize("key", FLAT_WRONG)
def test_a_flat_answer_that_makes_no_sense_is_one_line(
    fresh: StandIn, checkpoint: Path, make_blocks: Make, key: str
) -> None:
    fresh.flat = True
    for value in FLAT_WRONG[key]:
        fresh.fault = spoil(lambda meta, value=value: meta.update({key: value}))  # type: ignore[misc]
        with pytest.raises(UserError) as caught:
            client(fresh, checkpoint).score(make_blocks(2, 12), nothing)
        assert "\n" not in str(caught.value)


DEEP: Any = json.loads("[" * 200 + "]" * 200)
ODD: list[Any] = [None, 0, -1.5, True, "x", "", [], {}, [3], [{}], {"x": 1}, 10**400, DEEP]


def test_whatever_a_server_says_of_itself_is_taken_or_one_line(
    fresh: StandIn, checkpoint: Path
) -> None:
    whole, model = dict(fresh.info), dict(fresh.model)
    pages: list[tuple[Any, Any]] = [(value, model) for value in ODD]
    pages += [(whole, value) for value in ODD]
    pages += [({**whole, key: value}, model) for key in whole for value in ODD]
    for key in ("weight", "kvcache", "graph"):
        usage = {"weight": 0.5, "kvcache": 0.25}
        states = [[{"memory_usage": {**usage, key: value}}] for value in ODD]
        pages += [({**whole, "internal_states": state}, model) for state in states]
    overrides = ["{", "[]", "3", "null", '{"num_experts_per_tok": "4"}', "[" * 10_000]
    pages += [({**whole, "json_model_override_args": value}, model) for value in overrides]
    refused = 0
    try:
        for info, said in pages:
            fresh.info, fresh.model = info, said
            try:
                found = connect(
                    EngineSettings(name="sglang", base_url=fresh.url, retries=0), fresh.url
                )
                json.dumps([found.overrides, found.memory_gb, found.capacity])
            except UserError as error:
                refused += 1
                lines = str(error).splitlines()
                assert len(lines) == 1, (info, said)
    finally:
        fresh.info, fresh.model = whole, model
    assert len(ODD) < refused < len(pages)
