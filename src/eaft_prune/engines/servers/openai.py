"""What servers of OpenAI's completions say of themselves: models, limits, version, KV cache."""

from __future__ import annotations

import http.client
import re
from dataclasses import dataclass
from typing import Any

from eaft_prune.core.text import shortened
from eaft_prune.core.types import UserError
from eaft_prune.engines.servers.http import HttpClient

_MOST = 4 << 20  # bytes of /metrics
_CACHE = re.compile(rb'^vllm:cache_config_info\{.*kv_cache_size_tokens="(\d+)"', re.M)


@dataclass(frozen=True)
class Served:
    """One model of /v1/models."""

    name: str  # what requests call it
    root: str  # where its weights lie, as far as the server says
    max_len: int | None  # tokens of a sequence, new ones included


def models(client: HttpClient) -> list[Served]:
    """Every model that is served; raises UserError where that is no list of models."""
    answer = client.get("/v1/models")
    try:
        found = [
            Served(str(one["id"]), str(one.get("root") or one["id"]), _whole(one, "max_model_len"))
            for one in answer["data"]
        ]
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        why = shortened(str(error), 200)
        raise UserError(
            f"{client.base_url}/v1/models is no list of models ({type(error).__name__}: {why}): is "
            "it an OpenAI-compatible server?"
        ) from None
    if not found:
        raise UserError(f"{client.base_url} serves no model")
    return found


def capacity(client: HttpClient) -> int | None:
    """Tokens of all sequences that its KV cache holds; None where it does not tell."""
    try:
        with client.answer("GET", "/metrics", None) as response:
            found = _CACHE.search(response.read(_MOST)) if response.status == 200 else None
    except (OSError, http.client.HTTPException):
        return None  # a fact for the table, no more
    return int(found[1]) if found else None


def _whole(values: Any, name: str) -> int | None:
    value = values.get(name)
    if value is not None and type(value) is not int:
        raise ValueError(f"{name} = {shortened(repr(value))} is no integer")
    return value
