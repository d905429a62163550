"""llama.cpp itself, where it is installed: converter, logits and what it writes."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import tiny
from support.engines import options
from support.runs import World

from eaft_prune.checkpoints.read import open_model
from eaft_prune.config import EngineSettings
from eaft_prune.core.generation import Decoding
from eaft_prune.core.types import Blocks, UserError
from eaft_prune.engines.base import EngineOptions
from eaft_prune.engines.llamacpp.engine import LlamaEngine
from eaft_prune.engines.llamacpp.gguf import convert
from eaft_prune.engines.llamacpp.serving import serve
from eaft_prune.engines.loading import load_files

pytest_plugins = ("support.worlds",)

Make = Callable[..., Blocks]
PROMPTS = [[5, 9, 30], list(range(40, 75)), [7]]
PYTHON, CONVERTER = (os.environ.get(f"EAFT_LLAMACPP_{x}") for x in ("PYTHON", "CONVERTER"))
itself = pytest.mark.skipif(
    PYTHON is None or CONVERTER is None,
    reason="EAFT_LLAMACPP_PYTHON and EAFT_LLAMACPP_CONVERTER name no llama.cpp",
)


def nothing(done: int) -> None:
    pass


def yarn(truncate: bool) -> dict[str, Any]:
    return {
        "rope_type": "yarn",
        "rope_theta": 150000.0,
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "original_max_position_embeddings": 128,
        "truncate": truncate,
    }


def with_a_merge(path: Path) -> Path:
    """llama.cpp loads no BPE tokenizer without any."""
    file = path / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocab = tokenizer["model"]["vocab"]
    tokenizer["model"] |= {"vocab": {**vocab, "th": len(vocab)}, "merges": [["t", "h"]]}
    file.write_text(json.dumps(tokenizer))
    return path


MODELS: dict[str, Callable[[Path], Path]] = {
    "gpt_oss": lambda path: tiny.write_checkpoint(
        path, quantization_config=None, rope_parameters=yarn(True), intermediate_size=64
    ),
    "qwen3_moe": lambda path: tiny.write_moe(path, "qwen3_moe", fused=False, norm_topk_prob=True),
}


def opened(model: Path, log: Path, **changes: Any) -> LlamaEngine:
    how = {"gguf_type": "f32", "pre_tokenizer": "qwen2", **changes}
    settings = EngineSettings(name="llamacpp", python=PYTHON, converter=CONVERTER, **how)
    ours = options()
    return serve(EngineOptions(settings, ours.runtime, 20), open_model(with_a_merge(model)), 2, log)


@itself
@pytest.mark.server
@pytest.mark.process
@pytest.mark.parametrize("name", MODELS)
def test_it_scores_compares_and_writes_as_transformers(
    name: str, make_blocks: Make, tmp_path: Path
) -> None:
    """In float32, with YaRN's bounds rounded as llama.cpp always rounds them."""
    model = MODELS[name](tmp_path / "model")
    engine = load_files(open_model(model), options(device="cpu", dtype="float32"))
    theirs = opened(model, tmp_path / "server.log")
    blocks = make_blocks(3, 700)
    (expected, base), (ours, top) = (e.likeliest(blocks, 8, nothing) for e in (engine, theirs))
    apart = np.abs(ours.logp_T - expected.logp_T)
    print(f"{name}: {len(apart)} tokens: |d log p| mean {apart.mean():.1e}, max {apart.max():.1e}")
    assert apart.mean() < 2e-5
    assert apart.max() < 5e-4  # angles of the last positions, in float32
    np.testing.assert_allclose(ours.entropy_T, expected.entropy_T, atol=5e-4)
    np.testing.assert_allclose(top.logp_TK, base.logp_TK, atol=2e-2)  # half precision
    scored, divergence = theirs.diverge(blocks, base, nothing)
    assert scored.logp_T.tolist() == ours.logp_T.tolist()
    assert divergence.kl_T.max() < 1e-4
    stops = ((engine.generate(PROMPTS, Decoding(20, ()), 0, nothing)[0][1][4],), (3, 4))
    for how in (Decoding(20, ()), Decoding(20, stops), Decoding(20, (), seed=3)):
        assert theirs.generate(PROMPTS, how, 0, nothing) == engine.generate(
            PROMPTS, how, 0, nothing
        )
    gguf = tmp_path / "server.gguf"
    assert gguf.is_file()
    del theirs
    assert not gguf.exists()


@itself
@pytest.mark.server
@pytest.mark.process
def test_what_it_makes_otherwise_is_said(
    make_blocks: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """MXFP4 takes 8-bit activations there, and YaRN without rounding is not to be had."""
    blocks, found = make_blocks(3, 60), {}
    for truncate in (True, False):
        model = tiny.write_checkpoint(
            tmp_path / str(truncate), shards=1, rope_parameters=yarn(truncate)
        )
        engine = load_files(open_model(model), options(device="cpu", dtype="float32"))
        theirs = opened(model, tmp_path / f"{truncate}.log")
        apart = theirs.score(blocks, nothing).logp_T - engine.score(blocks, nothing).logp_T
        found[truncate] = np.abs(apart)
        print(f"MXFP4, {truncate=}: mean {np.abs(apart).mean():.1e}, max {np.abs(apart).max():.1e}")
    assert caplog.text.count("truncate = false") == 1
    assert 1e-4 < found[True].mean() < 0.3
    assert found[True].mean() < found[False].mean()


@itself
@pytest.mark.server
@pytest.mark.process
def test_a_gguf_is_written_once_and_writes_what_transformers_writes(
    world: World, tmp_path: Path
) -> None:
    model = with_a_merge(MODELS["gpt_oss"](tmp_path / "model"))
    llama = ("engine=llamacpp", f"engine.python='{PYTHON}'", f"engine.converter='{CONVERTER}'")
    how = (*llama, "engine.pre_tokenizer=qwen2", "engine.gguf_type=f32", f"model.path={model}")
    asked = ("task=gguf", *how, f"gguf.path={tmp_path}/out/model.gguf")
    done = world.run(*asked)
    assert done.code == 0, done.out + done.err
    facts = done.result["facts"]
    assert facts["smoke"]["first_difference"] is None
    assert facts["meta"]["expert_count"] == "8"
    (file,) = (tmp_path / "out").iterdir()
    assert hashlib.sha256(file.read_bytes()).hexdigest() == facts["sha256"]
    again = world.run(*asked)
    assert (again.code, "is there already" in again.err) == (2, True)
    # and the pipeline: base and pruned by llama.cpp, with the KL between them
    done = world.run(*how)
    assert done.code == 0, done.out + done.err
    assert done.result["facts"]["smoke"][0]["first_difference"] is None
    assert done.result["reports"]["pruned"]["UNION"]["64"]["kl_mean"] > 0
    assert not list(done.cwd.rglob("*.gguf"))


@pytest.mark.process
def test_a_converter_that_fails_tells_its_log_and_leaves_nothing(
    checkpoint: Path, tmp_path: Path
) -> None:
    script = tmp_path / "convert_hf_to_gguf.py"
    script.write_text(
        "import sys\n"
        "open(sys.argv[sys.argv.index('--outfile') + 1], 'w').close()\n"
        "sys.exit('BPE pre-tokenizer was not recognized')\n"
    )
    how = EngineSettings(name="llamacpp", python=sys.executable, converter=str(script))
    target = tmp_path / "out" / "model.gguf"
    with pytest.raises(UserError, match=r"code 1; engine.pre_tokenizer names one(.|\n)*not recog"):
        convert(how, open_model(checkpoint), target, tmp_path / "log")
    assert list(target.parent.iterdir()) == []
