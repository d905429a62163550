"""A checkpoint as GGUF, written by llama.cpp's own converter in another interpreter."""

from __future__ import annotations

import logging
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eaft_prune.checkpoints.families import family_of
from eaft_prune.checkpoints.read import ModelFiles
from eaft_prune.config import EngineSettings, resolve_path
from eaft_prune.core.types import UserError
from eaft_prune.engines.llamacpp import convert as shim
from eaft_prune.engines.servers.launched import tail

_NAME_ONE = "; engine.pre_tokenizer names one of llama.cpp's (qwen2 ...) that splits as this does"
log = logging.getLogger(__name__)


def converter(settings: EngineSettings) -> Path:
    """The converter that the settings name; raises UserError where there is none."""
    path = resolve_path(settings.converter or "")
    if not path.is_file():
        raise UserError(
            f"engine.converter = {settings.converter!r} is no file: give the convert_hf_to_gguf.py "
            "of a checkout of llama.cpp"
        )
    return path


def convert(settings: EngineSettings, files: ModelFiles, target: Path, log_file: Path) -> None:
    """Write `target` whole or not at all; raises UserError with the end of the converter's log."""
    assert settings.python is not None, "config requires engine.python"
    if deviation := rounds_yarn(files.config):
        log.warning("%s", deviation)
    draft = target.with_name(f".{target.name}.draft")
    command = [
        settings.python, shim.__file__, settings.pre_tokenizer or "", str(converter(settings)),
        str(files.path), "--outfile", str(draft), "--outtype", settings.gguf_type,
    ]  # fmt: skip
    log_file.parent.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    env = {**os.environ, **settings.env, "HF_HUB_OFFLINE": "1"}
    try:
        with log_file.open("ab") as out:
            code = subprocess.run(command, stdout=out, stderr=out, env=env, check=False).returncode
        if code or not draft.is_file():
            lines = "\n".join(tail(log_file))
            unknown = "pre-tokenizer was not recognized" in lines
            raise UserError(
                f"engine.converter ended with code {code}{_NAME_ONE if unknown else ''}; its log "
                f"{log_file}:\n{lines}"
            )
        draft.replace(target)
    except OSError as error:
        raise UserError(f"engine.python = {settings.python!r} cannot be run: {error}") from None
    finally:
        draft.unlink(missing_ok=True)


def rounds_yarn(config: Mapping[str, Any]) -> str | None:
    """What to say of a model whose rotary frequencies llama.cpp makes otherwise; None: nothing."""
    language = family_of(config).language(config)
    rope = language.get("rope_scaling") or language.get("rope_parameters") or {}
    if rope.get("rope_type") == "yarn" and rope.get("truncate") is False:
        return (
            "config.json says rope_scaling.truncate = false; llama.cpp always rounds YaRN's bounds "
            "(as truncate = true does), so its log p differ from transformers' by that"
        )
    return None
