"""A stand-in for an SGLang server: its wire format over transformers' own eager forward.

Not SGLang: an independent implementation of what `/generate` answers, for tests of the client.
`python -m sglang_standin ...` also takes the arguments of sglang.launch_server.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Json = dict[str, Any]
Floats = NDArray[np.floating[Any]]
Forward = Callable[[list[int]], Floats]
Fault = Callable[[BaseHTTPRequestHandler, int, list[Json]], bool]


class StandIn(ThreadingHTTPServer):
    """`forward(ids) -> log-softmax [S, V]`; `fault` may spoil an answer, or make its own (True)."""

    daemon_threads = True
    handler: type[BaseHTTPRequestHandler]

    def __init__(
        self, port: int, model_path: str, forward: Forward, host: str = "127.0.0.1"
    ) -> None:
        super().__init__((host, port), self.handler)
        self.forward = forward
        self.eos = -1  # of generation_config.json
        self.flat = False  # the format that newer servers answer in when asked
        self.fault: Fault = lambda handler, number, answers: False
        self.requests: list[Json] = []
        self.routed: list[NDArray[np.int64]] | None = None  # [L, E] a request, while recording
        self.lock = threading.Lock()
        self.model = {"model_path": model_path, "is_generation": True}
        self.info: Json = {
            "model_path": model_path,
            "port": port,
            "dtype": "float32",
            "attention_backend": "eager",
            "json_model_override_args": "{}",
            "max_total_num_tokens": 4096,
            "random_seed": port,
            "internal_states": [{"memory_usage": {"weight": 0.5, "kvcache": 0.25}}],
            "version": "0.0-stand-in",
        }

    @property
    def url(self) -> str:
        return "http://{}:{}".format(*self.server_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients of these tests hang up on purpose


class Handler(BaseHTTPRequestHandler):
    server: StandIn

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        pages: Json = {
            "/health_generate": {},
            "/get_model_info": self.server.model,
            "/get_server_info": self.server.info,
            "/v1/models": {"data": [{"id": "default", "root": self.server.model["model_path"]}]},
        }
        self.reply(pages.get(self.path), 200 if self.path in pages else 404)

    def do_POST(self) -> None:
        if self.path.endswith("_expert_distribution_record"):
            return self.record(self.path[1:].split("_")[0])
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append(body)
            number = len(self.server.requests)
        if body.get("stream"):
            return self.stream(body)
        if self.server.routed is not None:
            self.server.routed.append(route(self.server, body["input_ids"]))
            return self.reply([{"text": "", "meta_info": {}} for _ in body["input_ids"]])
        with self.server.lock:  # one forward at a time
            answers = (
                [written(self.server, ids, body["sampling_params"]) for ids in body["input_ids"]]
                if not body.get("return_logprob")
                else [
                    answer(self.server, body, ids, start)
                    for ids, start in zip(body["input_ids"], body["logprob_start_len"], strict=True)
                ]
            )
        if not self.server.fault(self, number, answers):
            self.reply(answers)
        return None

    def stream(self, body: Json) -> None:
        """Tokens of value 7, one message each."""
        openai = self.path.startswith("/v1/")
        asked = body["max_tokens"] if openai else body["sampling_params"]["max_new_tokens"]
        self.send_response(200)
        self.end_headers()
        if self.server.fault(self, len(self.server.requests), []):
            return
        for done in range(1, asked + 1):
            message: Json = {"text": "x" * done, "meta_info": {"completion_tokens": done}}
            if openai:
                message = {"choices": [{"text": "x"}], "usage": None}
            self.wfile.write(b"data: " + json.dumps(message).encode() + b"\n\n")
        if openai:
            usage = {"choices": [], "usage": {"completion_tokens": asked}}
            self.wfile.write(b"data: " + json.dumps(usage).encode() + b"\n\n")
        self.wfile.write(b"data: [DONE]\n\n")

    def record(self, what: str) -> None:
        """Like SGLang's recorder: sums of the selections of every forward pass, in a file."""
        if what == "start":
            self.server.routed = []
        elif what == "dump":
            import torch

            folder = Path(os.environ["SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR"])
            folder.mkdir(parents=True, exist_ok=True)
            counts = torch.from_numpy(np.stack(self.server.routed or []))
            torch.save(
                {"rank": 0, "logical_count": counts}, folder / "expert_distribution_recorder_1.5.pt"
            )
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"not JSON\n")

    def reply(self, value: Any, status: int = 200) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


StandIn.handler = Handler


def answer(server: StandIn, body: Json, ids: list[int], start: int) -> Json:
    """meta_info of one sequence: position `start` has no log-prob, every later one has."""
    logp, k = server.forward(ids), body["top_logprobs_num"]
    rows: list[Any] = [[None, ids[start], None]]
    rows += [[float(logp[t - 1, ids[t]]), ids[t], None] for t in range(start + 1, len(ids))]
    order = np.argsort(-logp[start:-1], axis=1)[:, :k]
    top = np.take_along_axis(logp[start:-1], order, axis=1)
    meta: Json = {"prompt_tokens": len(ids), "input_token_logprobs": rows}
    if server.flat and body.get("return_flat_raw_top_logprobs_b64"):
        meta |= {
            "input_top_logprobs_val_flat_b64": base64.b64encode(top.astype("<f4")).decode(),
            "input_top_logprobs_val_flat_b64_dtype": "float32",
            "input_top_logprobs_idx_flat_b64": base64.b64encode(order.astype("<i4")).decode(),
            "input_top_logprobs_idx_flat_b64_dtype": "int32",
            "input_top_logprobs_shape": list(top.shape),
            "input_top_logprobs_null_prefix": 1,
        }
    else:
        pairs = zip(top.tolist(), order.tolist(), strict=True)
        meta["input_top_logprobs"] = [
            None,
            *([[v, i, None] for v, i in zip(*pair, strict=True)] for pair in pairs),
        ]
    return {"text": "", "meta_info": meta}


def written(server: StandIn, ids: list[int], how: Json) -> Json:
    """Greedily, up to a stop that was asked for or an EOS of the server's own."""
    new: list[int] = []
    ends = {server.eos, *how["stop_token_ids"]}
    while len(new) < how["max_new_tokens"] and not ends.intersection(new):
        new.append(int(server.forward([*ids, *new])[-1].argmax()))
    return {"text": "", "output_ids": new, "meta_info": {"completion_tokens": len(new)}}


def route(server: StandIn, sequences: list[list[int]]) -> NDArray[np.int64]:
    """Selections [L, E] of a router that sends id t at layer l to experts t x (l + 1), +1, ..."""
    config = json.loads((Path(server.model["model_path"]) / "config.json").read_text())
    experts, top_k = config["num_local_experts"], config["num_experts_per_tok"]
    found = np.zeros((config["num_hidden_layers"], experts), np.int64)
    if "triton_kernel" not in server.info["args"]:  # a backend that SGLang does not record
        ids = np.concatenate(sequences)
        for layer, rank in np.ndindex(len(found), top_k):
            found[layer] += np.bincount((ids * (layer + 1) + rank) % experts, minlength=experts)
    return found


@contextmanager
def serving(server: StandIn) -> Iterator[StandIn]:
    """Answer requests in a thread."""
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def eager_forward(model: Any) -> Forward:
    """log-softmax [S, V] of transformers' own eager model, in float32."""
    import torch

    def forward(ids: list[int]) -> Floats:
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0]
        logp: Floats = torch.log_softmax(logits.float(), dim=-1).numpy()
        return logp

    return forward


def bigram_forward(ids: list[int]) -> Floats:
    """A model that is there at once: logits that depend on the token before, 300 words."""
    logits = np.stack([np.random.default_rng(i).normal(0, 2, 300) for i in ids])
    logp: Floats = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    return logp


def main() -> None:
    """What `python -m sglang.launch_server` is called with."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--host")
    parser.add_argument("--port", type=int, required=True)
    known, rest = parser.parse_known_args()
    if "--refuse" in rest:
        sys.exit("no such kernel")
    server = StandIn(known.port, known.model_path, bigram_forward)
    server.info |= {"args": rest, "env": os.environ.get("STAND_IN")}
    if "--never-ready" in rest:
        threading.Event().wait()
    print("ready", flush=True)
    server.serve_forever(0.01)


if __name__ == "__main__":
    main()
