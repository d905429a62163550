"""Prompts -> requests in flight -> what a server wrote after each, up to the stops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from eaft_prune.config import EngineSettings
from eaft_prune.core.generation import Decoding, ended_at
from eaft_prune.engines.base import OnTokens
from eaft_prune.engines.servers.http import HttpClient


def written(
    client: HttpClient,
    settings: EngineSettings,
    prompts: Sequence[Sequence[int]],
    how: Decoding,
    write: Callable[[int], list[int]],
    on_tokens: OnTokens,
) -> tuple[list[list[int]], list[bool]]:
    """What `write` gets for prompt i, and whether it ended by itself.

    A longer stop is cut off here: servers know stops of one token.
    """
    lists: list[list[int]] = []
    ended: list[bool] = []
    with ThreadPoolExecutor(settings.concurrency) as pool, client.together():
        for ids in pool.map(write, range(len(prompts))):
            end = ended_at(ids, how.stops)
            lists.append(ids if end is None else ids[:end])
            ended.append(end is not None)
            on_tokens(how.max_new_tokens)
    return lists, ended
