"""How often a server routes to each expert, by SGLang's own expert distribution recorder."""

from __future__ import annotations

import http.client
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from eaft_prune.config import EngineSettings
from eaft_prune.core.types import Blocks, UserError
from eaft_prune.engines.base import OnTokens
from eaft_prune.engines.servers.http import HttpClient
from eaft_prune.engines.servers.scoring import check_ids
from eaft_prune.engines.sglang.engine import SglangEngine

_ENDPOINT = "/{}_expert_distribution_record"
_FILES = "expert_distribution_recorder_*.pt"


def recording(settings: EngineSettings, folder: Path) -> EngineSettings:
    """The settings that launch a server which records into `folder`."""
    args = (
        *settings.args,
        *("--expert-distribution-recorder-mode", "stat"),
        *("--expert-distribution-recorder-buffer-size", "-1"),  # every forward pass
        "--disable-radix-cache",  # every token is routed, none is remembered
    )
    env = {**settings.env, "SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR": str(folder)}
    return settings.model_copy(update={"args": args, "env": env})


def selections(
    engine: SglangEngine, blocks: Blocks, n_layers: int, n_experts: int, folder: Path, on: OnTokens
) -> NDArray[np.int64]:
    """Selections of every expert by all tokens of the blocks, scored or not: [L, E].

    Raises UserError unless every layer was recorded for every token.
    """
    import torch

    check_ids(blocks, engine.vocab_size)
    client, batch = engine.server.client, engine.settings.batch_blocks
    _ask(client, "start")
    for ids_bS in np.array_split(blocks.ids_BS, range(batch, len(blocks), batch)):
        sampling = {"max_new_tokens": 0, "temperature": 0}
        client.post("/generate", {"input_ids": ids_bS.tolist(), "sampling_params": sampling})
        on(ids_bS.size)
    _ask(client, "stop")
    _ask(client, "dump")
    files = sorted(folder.glob(_FILES))
    if len(files) != 1:
        raise UserError(f"the server left {len(files)} records in {folder}, not 1")
    steps = torch.load(files[0], map_location="cpu", weights_only=True)["logical_count"]
    found: NDArray[np.int64] = steps.numpy().astype(np.int64).sum(axis=0)
    expected = blocks.ids_BS.size * engine.conditions["top_k"]
    if found.shape != (n_layers, n_experts) or (found.sum(axis=1) != expected).any():
        raise UserError(
            f"the server recorded {found.sum(axis=-1).tolist()} selections a layer instead of "
            f"{expected:,} in each of {n_layers}: not every --moe-runner-backend is recorded "
            "(triton is, triton_kernel is not)"
        )
    return found


def _ask(client: HttpClient, what: str) -> None:
    path = _ENDPOINT.format(what)
    try:
        with client.answer("POST", path, None) as response:
            status = response.status
    except (OSError, http.client.HTTPException) as error:  # repeated, a dump would be empty
        raise UserError(f"{client.base_url}{path}: {type(error).__name__}: {error}") from error
    if status != 200:
        raise UserError(f"{client.base_url}{path}: status {status}")
