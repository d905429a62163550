"""SGLang on one GPU: parity, recorded routing and decoding speed, every step timed.

    bash benchmarks/sglang_gpu.sh run DATA    # says how sglang gets there

Several servers share the GPU; only one is asked at a time. A step that fails is reported and the
others go on; results are written after each. DATA: Blocks as the store saves them in blocks/, and
plan.json ({"kept", "n_experts"}) of the demo model, or of --model. `--shape tiny --shrink 64` tries
this script.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from common import options, untold
from random_checkpoint import SHAPES
from sglang_steps import Steps, decode, stop

from eaft_prune.checkpoints.families import family_of
from eaft_prune.checkpoints.read import open_model
from eaft_prune.checks.engine_parity import parity
from eaft_prune.config import EngineSettings, RuntimeSettings
from eaft_prune.core.store import load
from eaft_prune.core.types import Blocks, KeepPlan
from eaft_prune.engines.loading import load_files
from eaft_prune.engines.sglang.engine import SglangEngine
from eaft_prune.engines.sglang.server import Server, launch
from eaft_prune.engines.sglang.serving import serve
from eaft_prune.engines.sglang.usage import recording, selections
from eaft_prune.stages.export import Target, export

REPOSITORY = Path(__file__).resolve().parents[1]
DEMO = REPOSITORY / "src" / "eaft_prune" / "demo" / "checkpoint"
ARGS = (
    "--attention-backend", "triton", "--sampling-backend", "pytorch", "--grammar-backend", "none",
    "--disable-radix-cache", "--skip-server-warmup",
    # of several servers on one GPU: room for these tokens, whatever the others leave
    "--mem-fraction-static", "0.9",
)  # fmt: skip
DECODING = (
    "--skip-tokenizer-init", "--max-total-tokens", "160000", "--context-length", "9216",
    "--cuda-graph-bs", "1", "8", "16", "64", "--stream-interval", "16",
    "--disable-prefill-cuda-graph",
)  # fmt: skip
SCORING = ("--max-total-tokens", "32768", "--disable-cuda-graph", "--context-length", "4096")
SERVED = {"base": 32, "keep24": 24, "keep20": 20, "keep16": 16}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """What every step found, by its name."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("/tmp/sglang_gpu"))
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--model", type=Path, default=DEMO, help="of parity and usage")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="20b", help="of decoding")
    parser.add_argument("--served", nargs="+", choices=SERVED, default=list(SERVED))
    parser.add_argument("--shrink", type=int, default=1, help="divides lengths and waits")
    parser.add_argument("--only", choices=("decode",), help="leave out parity and usage")
    options = parser.parse_args(arguments)
    steps = Steps(options.out, options.seconds)
    options.work.mkdir(parents=True, exist_ok=True)
    settings = EngineSettings(
        name="sglang", python=options.python, args=ARGS, ready_s=options.seconds, timeout_s=240,
        retries=0,
    )  # fmt: skip
    pool = ThreadPoolExecutor(12)
    try:
        run(steps, options, settings, pool)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        logs = sorted(options.work.glob("*.log"))
        text = "".join(
            f"=== {log.name}\n{log.read_text(errors='replace')[-20000:]}\n" for log in logs
        )
        (options.out / "servers.log").write_text(text)
    return steps.found


def run(
    steps: Steps, options: argparse.Namespace, settings: EngineSettings, pool: ThreadPoolExecutor
) -> None:
    work: Path = options.work
    decoding = settings.model_copy(update={"args": (*ARGS, *DECODING)})
    servers = {
        name: pool.submit(decoded_by, decoding, options.shape, SERVED[name], work / f"20b-{name}")
        for name in options.served
    }
    if options.only != "decode":
        compare(steps, options, settings, pool)
    decode(steps, servers, options.shrink)


def compare(
    steps: Steps, options: argparse.Namespace, settings: EngineSettings, pool: ThreadPoolExecutor
) -> None:
    """The demo model and its pruned copy against transformers and our trace."""
    work: Path = options.work
    models = {"base": options.model}
    with steps.step("prune the demo model"):
        models["keep24"] = pruned(options.model, options.data / "plan.json", work / "demo-keep24")
    scoring = settings.model_copy(update={"args": (*ARGS, *SCORING)})
    records = work / "records"
    triton = scoring.model_copy(update={"args": (*scoring.args, "--moe-runner-backend", "triton")})
    demo = {
        name: pool.submit(scored_by, [scoring, triton], path, work / f"demo-{name}.log")
        for name, path in models.items()
    }
    usage = pool.submit(
        scored_by, [recording(triton, records)], options.model, work / "demo-usage.log"
    )
    blocks = load(options.data / "blocks", Blocks)
    with steps.step("transformers, demo model"):
        ours = {name: local(path, blocks) for name, path in models.items()}
    for name, server in demo.items():
        with steps.step(f"parity, demo {name}") as facts:
            engine = server.result(timeout=max(steps.left, 1))
            facts["server"] = dict(engine.server.args)
            started = time.monotonic()
            theirs = engine.score(blocks, untold)
            facts["tokens_per_s"] = blocks.ids_BS.size / (time.monotonic() - started)
            facts["parity"] = parity(ours[name], theirs, 0.15)
            print(json.dumps(facts["parity"], indent=1))
    with steps.step("usage, demo base") as facts:
        engine = usage.result(timeout=max(steps.left, 1))
        compare_usage(facts, engine, options.model, blocks, records)
    for future in (*demo.values(), usage):
        if future.done() and future.exception() is None:
            stop(future.result().server)


def pruned(model: Path, plan_file: Path, target: Path) -> Path:
    """The demo model cut by a plan."""
    plan = json.loads(plan_file.read_text())
    files = open_model(model)
    keep = KeepPlan(tuple(map(tuple, plan["kept"])), plan["n_experts"])
    how = {"base": {"label": "demo", "digest": "shipped"}, "criterion": "plan.json"}
    family = family_of(files.config)
    export(family, files, keep, Target(target, "benchmark", 5_000_000_000, how), untold)
    return target


def scored_by(tries: list[EngineSettings], model: Path, log: Path) -> SglangEngine:
    """A server of a demo model by the first settings that it starts with."""
    files = open_model(model)
    top_k = family_of(files.config).top_k(files.config)
    for number, settings in enumerate(tries):
        try:
            return serve(settings, files, top_k, 20, log.with_suffix(f".{number}.log"))
        except Exception as error:
            print(f"{log.stem}, settings {number}: {str(error)[:2500]}")
            last = error
    raise last


def decoded_by(settings: EngineSettings, shape: str, experts: int, target: Path) -> Server:
    """A server of random weights in a shape of random_checkpoint.py with these experts a layer."""
    started = time.monotonic()
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "random_checkpoint.py")]
    command += ["--out", str(target), "--experts", str(experts), "--model", shape]
    subprocess.run(command, check=True, timeout=settings.ready_s)
    written = time.monotonic() - started
    server = launch(settings, target, target.with_suffix(".log"))
    print(f"{target.name}: written in {written:.0f} s, up after {time.monotonic() - started:.0f} s")
    return server


def local(model: Path, blocks: Blocks) -> Any:
    """log p and H by transformers, in bfloat16 on this GPU."""
    runtime = RuntimeSettings(device="auto", dtype="bfloat16", store_dir="", checkpoint_dir="")
    return load_files(open_model(model), options(runtime)).score(blocks, untold)


def compare_usage(
    facts: dict[str, Any], engine: SglangEngine, model: Path, blocks: Blocks, records: Path
) -> None:
    """The server's counts beside those of our own trace, which knows all but the last position."""
    files = open_model(model)
    family = family_of(files.config)
    shape = family.n_layers(files.config), family.n_experts(files.config)
    theirs = selections(engine, blocks, *shape, records, untold)
    everywhere = np.ones_like(blocks.scored_BS)
    everywhere[:, 0] = False
    runtime = RuntimeSettings(device="auto", dtype="bfloat16", store_dir="", checkpoint_dir="")
    trace = load_files(files, options(runtime)).trace(replace(blocks, scored_BS=everywhere), untold)
    ours = np.stack([
        np.bincount(trace.experts_TLK[:, layer].ravel(), minlength=shape[1])
        for layer in range(shape[0])
    ])  # fmt: skip
    apart = np.abs(theirs / theirs.sum(1, keepdims=True) - ours / ours.sum(1, keepdims=True))
    facts["selections_a_layer"] = theirs.sum(axis=1).tolist()
    facts["total_variation"] = (apart.sum(axis=1) / 2).tolist()
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    code = 1
    try:
        main()
        code = 0
    except BaseException:
        traceback.print_exc(file=sys.stdout)
    finally:
        sys.stdout.flush()
        os._exit(code)  # threads may still wait for servers, which end with this process
