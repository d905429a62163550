"""A stand-in for a vLLM server: the wire format of its completions over transformers' forward.

Not vLLM: an independent implementation of what `/v1/completions` answers, for tests of the client.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from support.sglang_standin import Forward, Handler, Json, StandIn


class VllmHandler(Handler):
    server: VllmStandIn

    def do_GET(self) -> None:
        root = self.server.model["model_path"]
        most = self.server.max_model_len
        pages: Json = {
            "/v1/models": {"data": [{"id": "served", "root": root, "max_model_len": most}]},
            "/version": {"version": "0.0-stand-in"},
        }
        self.reply(pages.get(self.path), 200 if self.path in pages else 404)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompts = body["prompt"] if isinstance(body["prompt"][0], list) else [body["prompt"]]
        too_many = (body.get("prompt_logprobs") or 0) > self.server.max_logprobs
        if body["model"] != "served" or too_many:
            return self.reply({"error": {"message": "greater than max allowed"}}, 400)
        with self.server.lock:
            self.server.requests.append(body)
            number = len(self.server.requests)
            choices = [self.choice(body, i, ids) for i, ids in enumerate(prompts)]
        choices.reverse()  # in whatever order
        if not self.server.fault(self, number, choices):
            self.reply({"choices": choices})
        return None

    def choice(self, body: Json, index: int, ids: list[int]) -> Json:
        written, finish = list(ids), "length"
        for _ in range(body["max_tokens"]):
            written.append(int(self.server.forward(written)[-1].argmax()))
            if written[-1] in body.get("stop_token_ids", ()):
                finish = "stop"
                break
        k = body.get("prompt_logprobs")
        return {
            "index": index,
            "finish_reason": finish,
            "token_ids": written[len(ids) :],
            "prompt_token_ids": ids,
            "prompt_logprobs": None if k is None else rows(self.server.forward(ids), ids, k),
        }


class VllmStandIn(StandIn):
    """`max_logprobs` and `max_model_len` are what a real one is started with."""

    handler = VllmHandler

    def __init__(self, model_path: str, forward: Forward) -> None:
        super().__init__(0, model_path, forward)
        self.max_logprobs, self.max_model_len = 20, 64


def rows(logp: Any, ids: list[int], k: int) -> list[Json | None]:
    """None, then a map of the k likeliest ids and the prompt's own."""
    found: list[Json | None] = [None]
    for at in range(1, len(ids)):
        order = np.argsort(-logp[at - 1], kind="stable")
        ranks = {int(i): rank for rank, i in enumerate(order, 1)}
        wanted = [ids[at], *(int(i) for i in order[:k])]
        found.append(
            {
                str(i): {"logprob": float(logp[at - 1, i]), "rank": ranks[i], "decoded_token": "x"}
                for i in wanted
            }
        )
    return found
