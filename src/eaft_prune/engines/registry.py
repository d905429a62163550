"""Every engine by its name; what each needs is imported when it is opened."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from eaft_prune.checkpoints.read import ModelFiles
from eaft_prune.config import RuntimeSettings
from eaft_prune.config.base import allowed
from eaft_prune.core.plugins import load_object
from eaft_prune.core.types import UserError
from eaft_prune.engines.base import EngineKind, EngineOptions, Profiler, Writer
from eaft_prune.engines.world import is_cpu


def dtype_of(runtime: RuntimeSettings) -> str:
    """The precision a model runs in here: part of what is measured, so part of stage keys."""
    if runtime.dtype != "auto":
        return runtime.dtype
    if is_cpu(runtime):
        return "float32"
    from eaft_prune.engines.loading import resolve_dtype

    return resolve_dtype(runtime)


def _is_launched(options: EngineOptions) -> bool:
    return options.engine.base_url is None  # a given one may be started anew


def _transformers_key(options: EngineOptions) -> dict[str, Any]:
    # packed and dequantised experts are the same weights; transformers' kernels round otherwise
    suffix = "-kernels" if options.engine.experts == "kernels" else ""
    return {
        "engine": "transformers" + suffix,
        "dtype": dtype_of(options.runtime),
        "entropy_top_k": options.entropy_top_k,
    }


def _open_transformers(
    options: EngineOptions, files: ModelFiles, top_k: int, log: Path
) -> Profiler:
    from eaft_prune.engines.loading import load

    return load(files, options)


def _server_key(
    options: EngineOptions,
    name: str,
    account: Callable[[str], dict[str, Any]],
    version: Callable[[str], str],
) -> dict[str, Any]:
    """Of a launched server its version, arguments and environment; of a given one its account."""
    engine = options.engine
    if engine.base_url is not None:
        how = account(engine.base_url)
    else:
        assert engine.python is not None, "config requires one of base_url and python"
        how = {
            "version": version(engine.python), "args": list(engine.args), "env": engine.env,
        }  # fmt: skip
    return {"engine": name, "entropy_top_k": options.entropy_top_k, **how}


def _sglang_key(options: EngineOptions) -> dict[str, Any]:
    from eaft_prune.engines.sglang import server

    def account(base_url: str) -> dict[str, Any]:
        given = server.connect(options.engine, base_url)
        return {"version": given.version, "server": dict(given.args)}

    return _server_key(options, "sglang", account, server.SGLANG.version)


def _open_sglang(options: EngineOptions, files: ModelFiles, top_k: int, log: Path) -> Writer:
    from eaft_prune.engines.sglang.serving import serve

    return serve(options.engine, files, top_k, options.entropy_top_k, log)


def _check_sglang(options: EngineOptions, longest: int, path: Path) -> None:
    from eaft_prune.engines.sglang import server, serving

    if options.engine.base_url is not None:
        serving.check_given(options.engine, longest, path)
    else:
        server.SGLANG.version(options.engine.python or "")


def _vllm_key(options: EngineOptions) -> dict[str, Any]:
    from eaft_prune.engines.vllm import server

    def account(base_url: str) -> dict[str, Any]:
        given = server.connect(options.engine, base_url)
        return {"version": given.version, "max_len": given.model.max_len}

    return _server_key(options, "vllm", account, server.VLLM.version)


def _open_vllm(options: EngineOptions, files: ModelFiles, top_k: int, log: Path) -> Writer:
    from eaft_prune.engines.vllm.serving import serve

    return serve(options, files, top_k, log)


def _check_vllm(options: EngineOptions, longest: int, path: Path) -> None:
    from eaft_prune.engines.vllm import server

    engine = options.engine
    if engine.base_url is not None:
        given = server.connect(engine, engine.base_url, path)
        server.check_limits(given, longest, options.most_likeliest)
    else:
        server.VLLM.version(engine.python or "")


def _llamacpp_key(options: EngineOptions) -> dict[str, Any]:
    from eaft_prune.engines.llamacpp.serving import identity

    return identity(options)


def _open_llamacpp(options: EngineOptions, files: ModelFiles, top_k: int, log: Path) -> Writer:
    from eaft_prune.engines.llamacpp.serving import serve

    return serve(options, files, top_k, log)


def _check_llamacpp(options: EngineOptions, longest: int, path: Path) -> None:
    _llamacpp_key(options)  # interpreter, library and converter are there


TRANSFORMERS = EngineKind(
    name="transformers",
    key=_transformers_key,
    conditions=lambda options, top_k: {**_transformers_key(options), "top_k": top_k},
    open=_open_transformers,
    profiles=True,
    compares=True,
    writes=True,
)
SGLANG = EngineKind(
    name="sglang",
    key=_sglang_key,
    conditions=lambda options, top_k: None,
    open=_open_sglang,
    check=_check_sglang,
    compares=True,
    writes=True,
    lasting=_is_launched,
)
VLLM = EngineKind(
    name="vllm",
    key=_vllm_key,
    conditions=lambda options, top_k: None,
    open=_open_vllm,
    check=_check_vllm,
    compares=True,
    writes=True,
    lasting=_is_launched,
)
LLAMACPP = EngineKind(
    name="llamacpp",
    key=_llamacpp_key,
    conditions=lambda options, top_k: {**_llamacpp_key(options), "top_k": top_k},
    open=_open_llamacpp,
    check=_check_llamacpp,
    compares=True,
    writes=True,
)
ENGINES: Mapping[str, EngineKind] = {
    kind.name: kind for kind in (TRANSFORMERS, SGLANG, VLLM, LLAMACPP)
}


def engine_kind(name: str) -> EngineKind:
    """The engine that `engine.name` says: one of ENGINES, or module:NAME of the user's own.

    Raises UserError where there is none.
    """
    if ":" in name:
        kind = load_object("engine.name", name)
        if not isinstance(kind, EngineKind):
            raise UserError(f"engine.name = {name!r} is no EngineKind, but {kind!r:.80}")
        return kind
    if name not in ENGINES:
        raise UserError(
            f"engine.name = {name!r}; {allowed(name, list(ENGINES))}, or module:NAME of your own"
        )
    return ENGINES[name]
