"""Which engines take a checkpoint of keep_n experts, by their arguments and its config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support import tiny

from eaft_prune.checks.preflight import check_engine, preflight
from eaft_prune.config import EngineSettings
from eaft_prune.core.types import UserError

CONFIG = tiny.config(num_local_experts=32)


def how(name: str, *args: str, **more: Any) -> EngineSettings:
    return EngineSettings(name=name, python="/python", args=args, **more)


CASES = {
    "expert parallel": (how("sglang", "--ep-size", "4"), 24, None),
    "expert parallel, uneven": (how("sglang", "--ep-size=4"), 22, "wants a multiple of 4"),
    "the last one counts": (how("sglang", "--ep-size", "4", "--ep-size", "2"), 22, None),
    "fours": (how("sglang", "--moe-runner-backend", "flashinfer_mxfp4"), 22, "multiple of 4"),
    "no fours": (how("sglang", "--moe-runner-backend", "triton"), 22, None),
    "uneven": (how("vllm", "-tp", "4", "--enable-expert-parallel"), 22, None),
    "balanced": (
        how("vllm", "-tp", "2", "-dp", "2", "--enable-expert-parallel", "--enable-eplb"),
        22,
        "over 4 ranks",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_an_engine_fits_by_its_arguments(name: str) -> None:
    settings, keep_n, why = CASES[name]
    others = [fit for fit in preflight(CONFIG, keep_n, settings) if fit.engine != settings.name]
    assert len(others) == 3
    assert all(fit.ok for fit in others)  # the arguments are not theirs
    if why is None:
        return check_engine(CONFIG, keep_n, settings)
    with pytest.raises(UserError, match=f"keep_n = {keep_n} does not fit.*{why}"):
        check_engine(CONFIG, keep_n, settings)
    return None


def test_llama_cpp_fits_where_its_converter_knows_the_model(tmp_path: Path) -> None:
    script = tmp_path / "convert_hf_to_gguf.py"
    script.write_text("")
    settings = how("llamacpp", converter=str(script))
    with pytest.raises(UserError, match="knows no GptOssForCausalLM"):
        check_engine(CONFIG, 24, settings)
    (tmp_path / "conversion").mkdir()
    (tmp_path / "conversion" / "gpt_oss.py").write_text('@register("GptOssForCausalLM")\n')
    check_engine(CONFIG, 24, settings)
    many = tiny.config(num_local_experts=2048)
    with pytest.raises(UserError, match="LLAMA_MAX_EXPERTS"):
        check_engine(many, 1028, settings)
