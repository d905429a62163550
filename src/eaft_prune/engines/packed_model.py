"""gpt-oss's modules with packed experts: as many layers on the device as fit, the rest streamed."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from eaft_prune.checkpoints.families.base import Family
from eaft_prune.checkpoints.formats import MXFP4
from eaft_prune.checkpoints.read import ModelFiles
from eaft_prune.checkpoints.tensors import ReadTensor, reader
from eaft_prune.core.types import UserError
from eaft_prune.engines import attention, experts
from eaft_prune.engines.packed import HostLayers, Packed, PackedWeight, Scratch, spread
from eaft_prune.engines.world import world_size

log = logging.getLogger(__name__)

PROJECTIONS = ("gate_up_proj", "down_proj")
_PARTS = MXFP4.names("_proj")
_BLOCKS = _PARTS[0]
_FREE = 0.95  # of a GPU's free memory that is taken where no limit is set


@dataclass(frozen=True)
class Sizes:
    """Bytes on the device, apart from streamed layers."""

    layer: int  # packed experts of one layer
    fixed: int  # all weights that are no packed experts
    scratch: int  # dequantised experts of one layer
    working: int  # activations and logits of a batch

    def on_one(self, layers: int) -> int:
        """Bytes with all layers resident on one device."""
        return self.fixed + layers * self.layer + self.scratch + self.working

    def on_each(self, layers: int, devices: int) -> int:
        """Bytes on the fullest of several devices, each with its share of the layers."""
        share = -(-layers // devices)
        return self.fixed + share * self.layer + self.scratch + self.working


def is_packed(files: ModelFiles) -> bool:
    """Whether the experts are MXFP4 blocks and scales."""
    return any(name.endswith(_BLOCKS) for name in files.tensors)


def load(
    files: ModelFiles,
    family: Family,
    device: torch.device,
    dtype: torch.dtype,
    memory_gb: float | None,
    batch_tokens: int,
) -> Any:
    """The model with packed experts: on `device` if it fits, else on all GPUs, else streamed.

    The limit is `memory_gb` of each GPU, or what is free there. Raises UserError where even a
    streamed model does not fit.
    """
    layers = family.n_layers(files.config)
    if device.type == "cpu":  # the file's pages are the memory: the system keeps what it can
        return build(files, [device], dtype, layers, reader(files))
    sizes = weigh(files, dtype, batch_tokens)
    limit = _limit(device, memory_gb)
    if sizes.on_one(layers) <= limit or world_size() > 1:
        return _streamed(files, device, dtype, sizes, layers, limit)
    gpus = [device, *(gpu for gpu in _gpus() if gpu != device)]
    limit = min(_limit(gpu, memory_gb) for gpu in gpus)
    if len(gpus) > 1 and sizes.on_each(layers, len(gpus)) <= limit:
        log.info("layers are spread over %d GPUs", len(gpus))
        return build(files, gpus, dtype, 0, reader(files))
    return _streamed(files, device, dtype, sizes, layers, _limit(device, memory_gb))


def _streamed(
    files: ModelFiles,
    device: torch.device,
    dtype: torch.dtype,
    sizes: Sizes,
    layers: int,
    limit: int,
) -> Any:
    resident = resident_layers(sizes, layers, limit)
    if resident < layers:
        log.info("%d of %d layers' experts are streamed", layers - resident, layers)
    return build(files, [device], dtype, layers - resident, reader(files))


def _gpus() -> list[torch.device]:
    return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]


def _limit(device: torch.device, memory_gb: float | None) -> int:
    if memory_gb is not None:
        return int(memory_gb * 1e9)
    return int(torch.cuda.mem_get_info(device)[0] * _FREE)


def weigh(files: ModelFiles, dtype: torch.dtype, batch_tokens: int) -> Sizes:
    """Bytes that the parts of the model need on a device."""
    config = files.config
    packed = {n: e for n, e in files.tensors.items() if n.endswith(_PARTS)}
    layers = int(config["num_hidden_layers"])
    layer = sum(entry.nbytes for entry in packed.values()) // layers
    rest = sum(math.prod(e.shape) for n, e in files.tensors.items() if n not in packed)
    width = dtype.itemsize
    values = sum(2 * entry.nbytes for name, entry in packed.items() if name.endswith(_BLOCKS))
    hidden, inner = int(config["hidden_size"]), int(config["intermediate_size"])
    heads = int(config["num_attention_heads"]) * int(config["head_dim"])
    # what the experts hold of a chunk, what the layer holds of a batch, logits
    rows = min(batch_tokens, experts.TOKENS) * int(config["num_experts_per_tok"])
    working = rows * (3 * inner + 2 * hidden) * width
    working += batch_tokens * (6 * hidden + 3 * heads) * width + (2 << 30)
    return Sizes(layer, rest * width, values // layers * width, working)


def resident_layers(sizes: Sizes, layers: int, limit: int) -> int:
    """How many layers' experts stay on the device within `limit` bytes; two slots for the rest."""
    if sizes.on_one(layers) <= limit:
        return layers
    resident = (limit - sizes.on_one(0)) // sizes.layer - 2
    if resident < 0:
        need = sizes.on_one(2) / 1e9
        raise UserError(
            f"{limit / 1e9:.1f} GB of device memory (runtime.memory_gb, or what is free) do not "
            f"hold this model even with all experts streamed, which takes {need:.1f} GB: lower "
            "runtime.batch_tokens, or use a larger device"
        )
    return int(resident)


def build(
    files: ModelFiles,
    devices: Sequence[torch.device],
    dtype: torch.dtype,
    streamed: int,
    read: ReadTensor,
) -> Any:
    """The model, its layers over `devices` in turn and everything else on the first.

    `streamed` layers' experts are left in host memory (one device); `read` gives the tensors.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(files.path, local_files_only=True, trust_remote_code=False)
    config.num_experts_per_tok = files.config["num_experts_per_tok"]  # `eval.top_k` changes it
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the packing is ours to undo
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config,
            dtype=dtype,
            trust_remote_code=False,
            attn_implementation=attention.NAME,
            experts_implementation=experts.NAME,
        )
    model.eval().requires_grad_(False)
    inner = model.base_model
    inner.rotary_emb = type(inner.rotary_emb)(config).to(devices[0])  # made of the config alone
    count = len(inner.layers)
    host = spread(streamed, count)
    homes = [devices[layer * len(devices) // count] for layer in range(count)]
    packed: dict[str, torch.Tensor] = {}
    for name in files.tensors:
        layer = int(name.split(".layers.")[1].split(".")[0]) if ".layers." in name else None
        home = devices[0] if layer is None else homes[layer]
        if name.endswith(_PARTS):
            packed[name] = read(name, torch.device("cpu") if layer in host else home)
        else:
            module, _, leaf = name.rpartition(".")
            value = read(name, home).to(dtype)
            setattr(model.get_submodule(module), leaf, torch.nn.Parameter(value, False))
    model.tie_weights()
    _attach(model, packed, host, homes, dtype)
    return model


def _attach(
    model: Any,
    packed: Mapping[str, torch.Tensor],
    host: list[int],
    homes: list[torch.device],
    dtype: torch.dtype,
) -> None:
    """Put packed weights in the place of the experts' parameters."""
    scratch = {home: Scratch(home, dtype) for home in homes}

    def parts(layer: int, name: str) -> Packed:
        at = f"model.layers.{layer}.mlp.experts.{name}"
        blocks, scales = (packed[name] for name in MXFP4.names(at))
        return blocks, scales

    waiting = [{name: parts(layer, name) for name in PROJECTIONS} for layer in host]
    streams = bool(host) and homes[0].type == "cuda"
    stream = HostLayers(waiting, homes[0]) if streams else None
    for layer, block in enumerate(model.base_model.layers):
        for name in PROJECTIONS:
            if stream is not None and layer in host:
                read = partial(stream.read, host.index(layer), name)
            else:
                read = partial(parts, layer, name)
            delattr(block.mlp.experts, name)
            setattr(block.mlp.experts, name, PackedWeight(read, scratch[homes[layer]]))
