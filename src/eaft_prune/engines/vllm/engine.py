"""The vLLM engine: `prompt_logprobs` of completions for scores, completions for what is written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eaft_prune.config import EngineSettings
from eaft_prune.core.generation import Decoding
from eaft_prune.core.types import Blocks, UserError
from eaft_prune.engines.base import OnTokens
from eaft_prune.engines.servers.comparing import ServerComparer
from eaft_prune.engines.servers.scoring import (
    Request,
    Told,
    check_ids,
    checked,
    numbers,
    told,
    understanding,
)
from eaft_prune.engines.servers.writing import written
from eaft_prune.engines.vllm.server import COMPLETIONS, Server, check_length

_NUMBER = 256  # bytes of a log-prob with its token as JSON, amply
_BESIDE = 1 << 20  # bytes of an answer besides
_NEVER = -9999.0  # what it writes for a probability of 0
# as log-probs are: what generation_config.json would change is said
_PLAIN = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


@dataclass(frozen=True)
class VllmEngine(ServerComparer):
    """A server that compares and writes; several requests are in flight, results keep order."""

    server: Server
    settings: EngineSettings
    vocab_size: int
    top_k: int
    entropy_top_k: int

    @property
    def conditions(self) -> Mapping[str, Any]:
        launched = self.server.process is not None
        how = {"args": list(self.settings.args), "env": self.settings.env} if launched else {}
        return {
            "engine": "vllm",
            "version": self.server.version,
            "top_k": self.top_k,
            "entropy_top_k": self.entropy_top_k,
            "server": {"max_model_len": self.server.model.max_len, **how},
        }

    def told(self, blocks: Blocks, k: int, on_tokens: OnTokens) -> Iterator[Told]:
        check_ids(blocks, self.vocab_size)
        check_length(self.server, blocks.seq_len)
        ask = partial(self._ask, k=k)
        return told(self.server.client, self.settings, blocks, ask, on_tokens)

    def generate(
        self, prompts: Sequence[Sequence[int]], how: Decoding, first: int, on_tokens: OnTokens
    ) -> tuple[list[list[int]], list[bool]]:
        """What follows each prompt, and whether it ended by itself; prompt i is number first + i.

        The noise of a seed is the server's own, the same for base and candidate.
        """

        def write(i: int) -> list[int]:
            return self._write(list(prompts[i]), how, first + i)

        return written(self.server.client, self.settings, prompts, how, write, on_tokens)

    def _ask(self, request: Request, k: int) -> list[Told]:
        body = {
            "prompt": request.ids_bS.tolist(),
            "prompt_logprobs": k,
            "max_tokens": 1,
            "temperature": 0,
        }
        most = request.ids_bS.size * (k + 1) * _NUMBER + _BESIDE
        choices = self._choices(body, most, len(request.ids_bS))
        with self._understanding():
            return [
                _told(choice, ids, scored, k)
                for choice, ids, scored in zip(
                    choices, request.ids_bS, request.scored_bS, strict=True
                )
            ]

    def _write(self, prompt: list[int], how: Decoding, number: int) -> list[int]:
        drawn = {} if how.seed is None else {"seed": (how.seed << 32) + number}
        body = {
            "prompt": prompt,
            "max_tokens": how.max_new_tokens,
            "temperature": 0 if how.seed is None else how.temperature,
            "stop_token_ids": [stop[0] for stop in how.stops if len(stop) == 1],
            "ignore_eos": True,  # the stops are ours, whatever generation_config.json holds
            **drawn,
        }
        (choice,) = self._choices(body, how.max_new_tokens * _NUMBER + _BESIDE, 1)
        with self._understanding():
            ids = choice.get("token_ids")
            if not isinstance(ids, list) or not all(type(i) is int for i in ids) or not ids:
                raise ValueError("no token_ids")
            return ids

    def _choices(self, body: Mapping[str, Any], most: int, count: int) -> list[Mapping[str, Any]]:
        """The choices of an answer, in the order of the prompts."""
        asked = {"model": self.server.model.name, "return_token_ids": True, **_PLAIN, **body}
        answer = self.server.client.post(COMPLETIONS, asked, most)
        with self._understanding():
            choices: list[Mapping[str, Any]] = sorted(answer["choices"], key=lambda c: c["index"])
            if [choice["index"] for choice in choices] != list(range(count)):
                raise ValueError(f"{len(choices)} choices for {count} prompts")
            return choices

    def _understanding(self) -> AbstractContextManager[None]:
        return understanding(self.server.client, COMPLETIONS, f"vllm {self.server.version}")


def _told(
    choice: Mapping[str, Any], ids_S: NDArray[np.int32], scored_S: NDArray[np.bool_], k: int
) -> Told:
    """What is told of one block's scored tokens, everything checked."""
    if choice["prompt_token_ids"] != ids_S.tolist():
        raise UserError("the server answered log-probs of other token ids than were sent")
    rows = choice["prompt_logprobs"]
    if len(rows) != len(ids_S) or rows[0] is not None:
        raise UserError(f"the server answered {len(rows)} of {len(ids_S)} prompt log-probs")
    own, ids, top = [], [], []
    for at in np.flatnonzero(scored_S):
        row, mine = rows[at], str(ids_S[at])
        own.append(row[mine]["logprob"])
        # the prompt's own token is one of the likeliest, or there beside them
        inside = row[mine]["rank"] <= k
        likeliest = row if inside else {i: entry for i, entry in row.items() if i != mine}
        if len(likeliest) != k:
            raise UserError(f"the server answered {len(row)} top log-probs, not {k}")
        ids.append([int(i) for i in likeliest])
        top.append([entry["logprob"] for entry in likeliest.values()])
    if min(own) <= _NEVER:
        raise UserError("the server answered a probability of 0: its log has no place in a mean")
    flat = numbers([value for row in top for value in row], "prompt_logprobs")
    logp, of_top = numbers(own, "prompt_logprobs"), flat.reshape(len(top), k)
    return checked(logp, np.array(ids, np.int64), of_top)
