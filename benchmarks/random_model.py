"""gpt-oss-20b or -120b with random MXFP4 experts, made in memory: no checkpoint on disk."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from random_checkpoint import config_json

from eaft_prune.checkpoints.families.gpt_oss import FAMILY, tensor_table
from eaft_prune.checkpoints.read import ModelFiles, TensorEntry
from eaft_prune.engines.loading import register
from eaft_prune.engines.packed import PackedWeight
from eaft_prune.engines.packed_model import PROJECTIONS, build
from eaft_prune.engines.transformers import TransformersEngine


def random_files(model: str, layers: int | None = None) -> ModelFiles:
    """A checkpoint of a shape of random_checkpoint.py whose tensors lie nowhere."""
    config = config_json(model, layers)
    folder = Path(tempfile.mkdtemp())
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {}
    for name, spec in tensor_table(config).items():
        size = int(np.prod(spec.shape)) * (1 if spec.dtype == "U8" else 2)
        tensors[name] = TensorEntry(name, "", spec.dtype or "BF16", spec.shape, 0, size)
    return ModelFiles(folder, config, tensors, (), ())


def random_model(
    files: ModelFiles, device: torch.device, streamed: int = 0, dtype: torch.dtype = torch.bfloat16
) -> Any:
    """The model on `device`: random e2m1 codes, scales near 2^-6, small normal floats elsewhere."""
    register()
    generator = torch.Generator(device).manual_seed(0)

    def read(name: str, home: torch.device) -> torch.Tensor:
        shape = files.tensors[name].shape
        if files.tensors[name].dtype == "U8":
            low, high = (119, 123) if name.endswith("_scales") else (0, 256)
            drawn = torch.randint(
                low, high, shape, dtype=torch.uint8, device=device, generator=generator
            )
            return drawn.to(home)
        if name.endswith("norm.weight"):
            return torch.ones(shape, dtype=dtype, device=device)
        return torch.empty(shape, dtype=dtype, device=device).normal_(0, 0.02, generator=generator)

    return build(files, [device], dtype, streamed, read)


def unpack(model: Any) -> None:
    """Put dequantised parameters in the place of packed experts: the same weights in bfloat16."""
    for layer in model.base_model.layers:
        for name in PROJECTIONS:
            packed: PackedWeight = getattr(layer.mlp.experts, name)
            dense = packed.dense().clone()
            delattr(layer.mlp.experts, name)
            setattr(layer.mlp.experts, name, torch.nn.Parameter(dense, False))


def engine_of(model: Any, files: ModelFiles, tokens: int) -> TransformersEngine:
    """An engine over a model that was made here."""
    config = files.config
    return TransformersEngine(
        model, FAMILY, next(model.parameters()).device, "bfloat16", tokens, 20,
        FAMILY.top_k(config), FAMILY.n_experts(config),
    )  # fmt: skip
