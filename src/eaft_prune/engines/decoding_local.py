"""Decoding with transformers in this process: numbers for a demo, not for serving."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import psutil
import torch
import transformers

from eaft_prune.checkpoints.families.base import Family
from eaft_prune.checkpoints.read import ModelFiles
from eaft_prune.config import RuntimeSettings
from eaft_prune.engines.decoding import DecodeError, Prompts, Stream
from eaft_prune.engines.loading import load_dense, resolve_device, resolve_dtype


class LocalDecoder:
    """transformers' own model with eager attention and a KV cache; every sequence in step."""

    capacity: int | None = None

    def __init__(self, files: ModelFiles, family: Family, runtime: RuntimeSettings) -> None:
        if runtime.threads is not None:
            torch.set_num_threads(runtime.threads)
        self._device = resolve_device(runtime)
        self._dtype = resolve_dtype(runtime)
        # eager, as our attention takes no cache
        model = load_dense(files, family, self._dtype, bar=False, attn_implementation="eager")
        self._model = model.eval().to(self._device)

    @property
    def facts(self) -> Mapping[str, Any]:
        held = psutil.Process().memory_info().rss
        if self._device.type == "cuda":
            held = torch.cuda.max_memory_allocated(self._device)
        return {
            "engine": "transformers",
            "version": transformers.__version__,
            "dtype": self._dtype,
            "device": self._device.type,
            "memory_gb": round(held / 1e9, 3),
        }

    @torch.inference_mode()
    def decode(self, prompts: Prompts, new_tokens: int) -> list[Stream]:
        start = time.perf_counter()
        try:
            ids = torch.tensor(prompts, device=self._device)
            cache, first = None, 0.0
            for step in range(new_tokens):
                out = self._model(input_ids=ids, past_key_values=cache, use_cache=True,
                                  logits_to_keep=1)  # fmt: skip
                cache = out.past_key_values
                ids = out.logits[:, -1:].argmax(-1)
                if step == 0:
                    ids.cpu()  # waits for the device
                    first = time.perf_counter()
            ids.cpu()
        except torch.OutOfMemoryError as error:
            raise DecodeError(f"out of memory: {error}") from error
        end = time.perf_counter()
        return [Stream(first - start, end - start, new_tokens)] * len(prompts)
