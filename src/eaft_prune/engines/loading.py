"""A checkpoint becomes a resident model: plain, or with its MXFP4 experts left packed."""

from __future__ import annotations

import logging
from typing import Any

import torch

from eaft_prune.checkpoints.families import family_of
from eaft_prune.checkpoints.families.base import Family
from eaft_prune.checkpoints.families.gpt_oss import FAMILY as GPT_OSS
from eaft_prune.checkpoints.read import ModelFiles
from eaft_prune.config import RuntimeSettings
from eaft_prune.config.runtime import ExpertsMode
from eaft_prune.core.provenance import installed
from eaft_prune.core.quiet import quiet
from eaft_prune.core.types import UserError
from eaft_prune.engines import attention, experts, packed_model
from eaft_prune.engines.base import EngineOptions
from eaft_prune.engines.fused_layers import fuse
from eaft_prune.engines.parallel import ParallelEngine, load_everywhere
from eaft_prune.engines.plain_check import check_against_plain, made_up_tokens
from eaft_prune.engines.transformers import TransformersEngine
from eaft_prune.engines.world import world_size

log = logging.getLogger(__name__)

# on CPU activations of 2048 tokens stay in cache; a GPU wants to be filled
_CPU_TOKENS = 2048
_CUDA_TOKENS = 32768
_SMALL_CUDA_TOKENS = 8192  # where there is less than
_LARGE_CUDA = 40e9  # bytes
# whose masks ours knows: windows come as an argument, sinks too
_OUR_ATTENTION = ("gpt_oss", "mixtral", "qwen3_moe")


def resolve_device(runtime: RuntimeSettings) -> torch.device:
    """The device asked for; raises UserError when the machine does not have it."""
    if runtime.device == "auto":
        return _current_cuda() if torch.cuda.is_available() else torch.device("cpu")
    device = torch.device(runtime.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"runtime.device = {runtime.device!r}: this machine has no CUDA device")
    return _current_cuda() if device == torch.device("cuda") else device


def _current_cuda() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def resolve_dtype(runtime: RuntimeSettings) -> str:
    """`auto` is bfloat16 on CUDA and float32 on CPU."""
    if runtime.dtype != "auto":
        return runtime.dtype
    return "bfloat16" if resolve_device(runtime).type == "cuda" else "float32"


def load_files(files: ModelFiles, options: EngineOptions) -> TransformersEngine:
    """Load a checkpoint with the model code of transformers and our experts and attention.

    MXFP4 experts stay packed on CUDA, and on CPU where runtime.memory_gb is less than the model
    needs; elsewhere they are dequantised once. Both give the same weights to the last bit.
    """
    runtime, mode, family = options.runtime, options.engine.experts, family_of(files.config)
    entropy_top_k = options.entropy_top_k
    if runtime.threads is not None:
        torch.set_num_threads(runtime.threads)
    vocab = family.language(files.config).get("vocab_size", 0)
    if entropy_top_k > vocab:
        raise UserError(f"eval.entropy_top_k = {entropy_top_k} exceeds the vocabulary of {vocab}")
    register()
    device, dtype = resolve_device(runtime), resolve_dtype(runtime)
    tokens = runtime.batch_tokens or _batch_tokens(device, runtime)
    if _stays_packed(files, family, runtime, device, dtype, mode):
        model = packed_model.load(
            files, family, device, getattr(torch, dtype), runtime.memory_gb, tokens
        )
    else:
        model = _load_plain(files, family, device, dtype, runtime, mode)
    engine = TransformersEngine(
        model=model,
        family=family,
        device=device,
        dtype=dtype,
        batch_tokens=tokens,
        entropy_top_k=entropy_top_k,
        top_k=family.top_k(files.config),
        n_experts=family.n_experts(files.config),
        kernels=mode == "kernels",
    )
    if family is not GPT_OSS:  # which is proven by tests, and has its experts packed
        if device.type == "cuda" and dtype == "bfloat16" and mode != "kernels":
            count = fuse(model, made_up_tokens(model))
            log.debug("%d norms and attentions run fused", count)
        check_against_plain(model, engine.logits, dtype)
    return engine


def load(files: ModelFiles, options: EngineOptions) -> TransformersEngine | ParallelEngine:
    """The engine of this process, or of all that torchrun started."""
    if world_size() == 1:
        return load_files(files, options)
    return load_everywhere(load_files, files, options)


def register() -> None:
    """Make our experts and attention known to transformers."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(attention.NAME, attention.sink_attention)
    ALL_EXPERTS_FUNCTIONS.register(experts.NAME, experts.experts_forward)


def _stays_packed(
    files: ModelFiles,
    family: Family,
    runtime: RuntimeSettings,
    device: torch.device,
    dtype: str,
    mode: ExpertsMode,
) -> bool:
    mxfp4 = packed_model.is_packed(files)
    if mode in ("packed", "kernels") and not mxfp4:
        raise UserError(f"engine.experts = {mode!r}: the experts of {files.path} are not MXFP4")
    if mode != "auto":
        return mode == "packed"
    if not mxfp4:
        return False
    if device.type == "cuda":
        return True
    # four bits become 16 or 32
    need = files.weight_bytes * (4 if dtype == "bfloat16" else 8)
    return runtime.memory_gb is not None and need > runtime.memory_gb * 1e9


def _load_plain(
    files: ModelFiles,
    family: Family,
    device: torch.device,
    dtype: str,
    runtime: RuntimeSettings,
    mode: ExpertsMode,
) -> Any:
    # transformers has a bar of its own: shown where loading takes long enough to want one
    bar = runtime.progress and files.weight_bytes > 1e9
    known = family.model_type in _OUR_ATTENTION
    ours = {"attn_implementation": attention.NAME} if known else {}
    if mode == "kernels":
        model = _from_pretrained(files, family, dtype, bar, **ours, **_kernels_arguments(device))
        _refuse_dequantised(model)
    else:
        ours["experts_implementation"] = experts.NAME
        model = load_dense(files, family, dtype, bar, **ours)
    return model.eval().to(device)


def load_dense(files: ModelFiles, family: Family, dtype: str, bar: bool, **chosen: str) -> Any:
    """transformers' model on the CPU, all of it in one dtype, its experts dequantised."""
    model = _from_pretrained(files, family, dtype, bar, **chosen)
    for module in family.experts(model):
        # some versions of transformers leave dequantised experts in bfloat16, asked or not
        module.to(getattr(torch, dtype))
    return model


def _from_pretrained(
    files: ModelFiles, family: Family, dtype: str, bar: bool, **arguments: Any
) -> Any:
    with quiet(bar=bar):
        return family.load(files.path, files.config, dtype=getattr(torch, dtype), **arguments)


def _kernels_arguments(device: torch.device) -> dict[str, Any]:
    """transformers' own MXFP4 experts, whose kernels come from the hub."""
    from transformers import Mxfp4Config, __version__
    from transformers.utils import is_kernels_available

    if device.type != "cuda":
        raise UserError("engine.experts = 'kernels' needs a CUDA device: leave it at 'auto'")
    if not is_kernels_available():
        raise UserError(
            "engine.experts = 'kernels' needs the package `kernels` in a version that transformers "
            f"{__version__} takes (found: {installed('kernels')}): pip install 'eaft_prune[gpu]', "
            "or leave it at 'auto'"
        )
    return {"quantization_config": Mxfp4Config(), "device_map": str(device)}


def _refuse_dequantised(model: Any) -> None:
    """transformers only warns where it finds no use for packed experts and unpacks them."""
    if model.hf_quantizer.quantization_config.dequantize:
        capability = ".".join(map(str, torch.cuda.get_device_capability()))
        raise UserError(
            "engine.experts = 'kernels': transformers dequantised the experts instead; it wants "
            f"compute capability 7.5 (this device: {capability}) and Triton 3.4 (found: "
            f"{installed('triton')}): leave it at 'auto'"
        )


def _batch_tokens(device: torch.device, runtime: RuntimeSettings) -> int:
    if device.type == "cpu":
        return _CPU_TOKENS
    total = torch.cuda.get_device_properties(device).total_memory
    held = min(total, (runtime.memory_gb or 1e9) * 1e9)
    return _CUDA_TOKENS if held >= _LARGE_CUDA else _SMALL_CUDA_TOKENS
