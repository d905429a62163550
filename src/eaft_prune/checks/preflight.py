"""Will the engines take a checkpoint of keep_n experts a layer? Known before anything is profiled.

What is known: SGLang asserts that expert-parallel ranks hold as many experts each; vLLM refuses the
same only under --enable-eplb; flashinfer's TensorRT-LLM kernels want multiples of 4 in both;
llama.cpp holds at most LLAMA_MAX_EXPERTS, 1024 in 2026 (256 in builds before).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eaft_prune.checkpoints.families import family_of
from eaft_prune.config import EngineSettings, resolve_path
from eaft_prune.core.types import UserError

_LLAMA_MAX_EXPERTS = 1024
_FOURS = ("flashinfer_mxfp4", "flashinfer_trtllm")
_FURTHER = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers")


@dataclass(frozen=True)
class Fit:
    """One engine; `why` says why not, or what it does otherwise."""

    engine: str
    ok: bool
    why: str


def preflight(config: Mapping[str, Any], keep_n: int, settings: EngineSettings) -> list[Fit]:
    """A line an engine for a checkpoint of this config, cut to keep_n experts a layer.

    engine.args are those of engine.name: another engine is taken with none.
    """
    family = family_of(config)
    language, cut = family.language(config), keep_n < family.n_experts(config)
    further = [key for key in _FURTHER if cut and language.get(key)]
    note = f"without the layers of {further[0]}: no speculation by them" if further else ""
    found = [Fit("transformers", True, note)]
    checks: dict[str, Callable[[EngineSettings, int], str | None]] = {
        "sglang": _sglang,
        "vllm": _vllm,
        "llamacpp": lambda own, keep: _llamacpp(own, keep, config),
    }
    for name, check in checks.items():
        own = settings if settings.name == name else EngineSettings.model_construct(name=name)
        why = check(own, keep_n)
        found.append(Fit(name, why is None, why or note))
    return found


def check_engine(config: Mapping[str, Any], keep_n: int, settings: EngineSettings) -> None:
    """Raise UserError where the engine that evaluates would not take the checkpoint."""
    for fit in preflight(config, keep_n, settings):
        if fit.engine == settings.name and not fit.ok:
            raise UserError(
                f"pruning.keep_n = {keep_n} does not fit engine={fit.engine}: {fit.why}"
            )


def _sglang(settings: EngineSettings, keep_n: int) -> str | None:
    ranks = _number(settings.args, "--ep-size", "--ep", "--expert-parallel-size")
    if keep_n % ranks:
        return f"--ep-size {ranks} wants a multiple of {ranks}"
    backend = _value(settings.args, "--moe-runner-backend")
    if backend in _FOURS and keep_n % 4:
        return f"--moe-runner-backend {backend} wants a multiple of 4"
    return None


def _vllm(settings: EngineSettings, keep_n: int) -> str | None:
    args = settings.args
    ranks = _number(args, "--tensor-parallel-size", "-tp")
    ranks *= _number(args, "--data-parallel-size", "-dp")
    if {"--enable-eplb", "--enable-expert-parallel"} <= set(args) and keep_n % ranks:
        return f"--enable-eplb over {ranks} ranks wants a multiple of {ranks}"
    return None


def _llamacpp(settings: EngineSettings, keep_n: int, config: Mapping[str, Any]) -> str | None:
    if keep_n > _LLAMA_MAX_EXPERTS:
        return f"it holds at most {_LLAMA_MAX_EXPERTS} experts a layer (LLAMA_MAX_EXPERTS)"
    (architecture,) = (config.get("architectures") or ["?"])[:1]
    if settings.converter and not _converts(resolve_path(settings.converter), architecture):
        return f"engine.converter knows no {architecture}"
    return None


def _converts(converter: Path, architecture: str) -> bool:
    """Whether a converter's text registers an architecture, in itself or in files beside it."""
    texts = [converter, *sorted((converter.parent / "conversion").glob("*.py"))]
    return any(
        f'"{architecture}"' in text.read_text(encoding="utf-8") for text in texts if text.is_file()
    )


def _number(args: Sequence[str], *names: str) -> int:
    """A count among a server's arguments; 1 where it is not said."""
    value = _value(args, *names)
    return int(value) if value and value.isdecimal() and int(value) else 1


def _value(args: Sequence[str], *names: str) -> str | None:
    """What `--name VALUE` or `--name=VALUE` says, the last of them."""
    found = None
    for i, arg in enumerate(args):
        name, equals, value = arg.partition("=")
        if name in names:
            found = value if equals else next(iter(args[i + 1 :]), None)
    return found
