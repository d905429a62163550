"""Streams of new tokens from a server, timed: SGLang's /generate or OpenAI's /v1/completions."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from eaft_prune.engines.servers.http import HttpClient

Api = Literal["sglang", "openai"]
Prompts = Sequence[Sequence[int]]
_LONGEST = 16 << 20  # bytes of a line of a stream


class DecodeError(RuntimeError):
    """A batch that was not decoded to its end; the message says why."""


@dataclass(frozen=True)
class Stream:
    """One sequence; seconds since its batch was sent."""

    first_s: float  # until the first new token
    end_s: float
    tokens: int


class Decoder(Protocol):
    """Whoever decodes batches of prompts."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """What it is: engine, version, memory_gb ..."""

    @property
    def capacity(self) -> int | None:
        """Tokens of all sequences that it holds at once; None: it does not tell."""

    def decode(self, prompts: Prompts, new_tokens: int) -> list[Stream]:
        """Exactly `new_tokens` more of every prompt, greedily, past EOS; raises DecodeError."""


@dataclass(frozen=True)
class HttpDecoder:
    """A server; every sequence is a streaming request of its own, all sent at once."""

    client: HttpClient
    api: Api
    facts: Mapping[str, Any] = field(default_factory=dict)
    capacity: int | None = None
    model_name: str = "default"

    def decode(self, prompts: Prompts, new_tokens: int) -> list[Stream]:
        start = time.perf_counter()

        def one(prompt: Sequence[int]) -> Stream:
            return self._stream(list(prompt), new_tokens, start)

        with ThreadPoolExecutor(len(prompts)) as pool, self.client.together():
            return list(pool.map(one, prompts))

    def _stream(self, prompt: list[int], new_tokens: int, start: float) -> Stream:
        path = "/generate" if self.api == "sglang" else "/v1/completions"
        first, last = None, b""
        try:
            with self.client.answer("POST", path, self._body(prompt, new_tokens)) as response:
                if response.status != 200:
                    what = response.read(300).decode("utf-8", "replace")
                    raise DecodeError(f"status {response.status}: {what}")
                while line := response.readline(_LONGEST):
                    if len(line) == _LONGEST:
                        raise DecodeError(f"a line of the stream has {_LONGEST:,} bytes or more")
                    if line.startswith(b"data: ") and not line.startswith(b"data: [DONE]"):
                        first = first or time.perf_counter()
                        last = line  # parsed once, at the end: not to take time from the others
        except (OSError, http.client.HTTPException) as error:
            raise DecodeError(f"{self.client.base_url}: {type(error).__name__}: {error}") from error
        end = time.perf_counter()
        tokens = _tokens(last, self.api)
        if first is None or tokens != new_tokens:
            raise DecodeError(f"{tokens} of {new_tokens} new tokens came")
        return Stream(first - start, end - start, tokens)

    def _body(self, prompt: list[int], new_tokens: int) -> dict[str, Any]:
        if self.api == "sglang":
            sampling = {"max_new_tokens": new_tokens, "temperature": 0, "ignore_eos": True}
            return {"input_ids": prompt, "sampling_params": sampling, "stream": True}
        return {
            "model": self.model_name,
            "prompt": prompt,
            "max_tokens": new_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }


def _tokens(line: bytes, api: Api) -> int:
    """How many tokens the last message of a stream speaks of."""
    try:
        message = json.loads(line.removeprefix(b"data: "))
        if "error" in message:
            raise DecodeError(f"the server says: {message['error']}")
        where = message["meta_info"] if api == "sglang" else message["usage"]
        return int(where["completion_tokens"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        text = line.decode("utf-8", "replace")[:200]
        raise DecodeError(f"the stream ended with {text!r}") from error
