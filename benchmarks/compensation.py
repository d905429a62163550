"""Perplexity lost by a plan without and with compensation, on blocks that nothing was fitted on.

    python benchmarks/compensation.py [SETTING=VALUE ...]
        [--keep-n 28 24 20 16] [--criteria reap eaft_reap]
        [--levels none bias down_proj experts] [--roundings nearest feedback] [--unquantised]
        [--token-weights robust uniform] [--blocks 64] [--packs UNION] [--ridges auto]
        [--eval-blocks 32] [--home DIR]

One line a variant: PPL of UNION and of each pack minus the base's, in percent; means over
layers of the residuals (of all calibration tokens as stored, of held-out rows by a fit on the
others, by one on half of those); the ridges; tokens; seconds to compensate. --unquantised
does the same to a copy of the model with experts in bfloat16, so that nothing is rounded to MXFP4.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from pathlib import Path

import torch

from eaft_prune.checkpoints.read import open_model
from eaft_prune.checkpoints.slice import copy_file, write_text
from eaft_prune.cli.main import check
from eaft_prune.core.progress import Bars
from eaft_prune.core.store import Store
from eaft_prune.engines.packed import dequantize
from eaft_prune.packs import sources
from eaft_prune.pipeline.arrow import measure, open_base, select, write
from eaft_prune.pipeline.observer import Silent
from eaft_prune.pipeline.session import Bench, Resident
from eaft_prune.records.evaluation import compare

_RESIDENT = Resident()


def variant(home: Path, settings: list[str]) -> str:
    """One line of the table."""
    (experiment,) = check(
        [
            *settings, "runtime.progress=false", f"runtime.store_dir={home}/store",
            f"runtime.checkpoint_dir={home}/checkpoints",
        ]
    ).experiments  # fmt: skip
    bench = Bench(experiment, Store(home / "store"), Silent(), Bars(False), _RESIDENT)
    base = open_base(bench)
    selection = select(bench, base)
    measured = measure(bench, base, "base", base)
    pruned = measure(bench, write(bench, base, selection), "pruned", base)
    reports = compare(experiment.eval, experiment.gate, measured, [pruned]).reports
    lost = {
        pack: 100 * (report.ppl / reports["base"][pack, length].ppl - 1)
        for (pack, length), report in reports["pruned"].items()
    }
    text = "  ".join(f"{pack[:9]:>9} {percent:+6.2f}%" for pack, percent in lost.items())
    for record in bench.records:
        if record.stage == "compensate":
            facts = record.facts
            text += f"  residual {facts['residual']:.3f} held {facts['held_out']:.3f} half "
            text += f"{facts['held_out_by_half']:.3f}  ridges {facts['ridges']}  "
            text += f"{facts['scored_tokens']:,} tokens of {experiment.compensation.pack}"
            text += f"  {record.seconds:.0f} s"
    return text


def unquantised(model: Path, out: Path) -> Path:
    """The same weights with experts in bfloat16, which holds every MXFP4 value exactly."""
    from safetensors.torch import load_file, save_file

    if out.exists():
        return out
    out.mkdir(parents=True)
    files = open_model(model)
    tensors = {n: t for shard in files.shards for n, t in load_file(model / shard).items()}
    for name in [name for name in tensors if name.endswith("_blocks")]:
        blocks, stem = tensors.pop(name), name.removesuffix("_blocks")
        scales = tensors.pop(f"{stem}_scales")
        values = torch.empty(*scales.shape[:-1], scales.shape[-1] * 32)
        dense = dequantize(blocks, scales, values).transpose(1, 2)
        tensors[stem] = dense.bfloat16().contiguous()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = {key: value for key, value in files.config.items() if key != "quantization_config"}
    write_text(out / "config.json", json.dumps(config))
    for name in files.companions:
        copy_file(model / name, out / name)
    return out


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--keep-n", nargs="*", type=int, default=[28, 24, 20, 16])
    parser.add_argument("--criteria", nargs="*", default=["reap", "eaft_reap"])
    parser.add_argument("--levels", nargs="*", default=["none", "bias", "down_proj", "experts"])
    parser.add_argument("--roundings", nargs="*", default=["nearest", "feedback"])
    parser.add_argument("--token-weights", nargs="*", default=["robust"])
    parser.add_argument("--unquantised", action="store_true")
    parser.add_argument("--blocks", nargs="*", type=int, default=[64])
    parser.add_argument("--packs", nargs="*", default=["UNION"])
    parser.add_argument("--ridges", nargs="*", default=["auto"])
    parser.add_argument("--eval-blocks", type=int, default=32)
    parser.add_argument("--home", type=Path, default=Path(tempfile.gettempdir()) / "compensation")
    given, settings = parser.parse_known_args()
    settings += [f"eval.num_blocks={given.eval_blocks}", "eval.seq_lens=[1024]"]
    settings += ["gate.seq_lens=[1024]"]
    if given.unquantised:
        (experiment,) = check(settings).experiments
        copy = unquantised(sources.model_path(experiment.model), given.home / "unquantised")
        settings += ["model=local", f"model.path={copy}"]
    for criterion, keep_n in itertools.product(given.criteria, given.keep_n):
        for level in given.levels:
            rounded = level in ("down_proj", "experts") and not given.unquantised
            for rounding, tokens, blocks, pack, ridge in itertools.product(
                given.roundings if rounded else ["nearest"],
                ["robust"] if level == "none" else given.token_weights,
                [64] if level == "none" else given.blocks,
                ["UNION"] if level == "none" else given.packs,
                ["auto"] if level == "none" else given.ridges,
            ):
                line = variant(
                    given.home,
                    [
                        *settings,
                        f"pruning={criterion}",
                        f"pruning.keep_n={keep_n}",
                        f"pruning.compensation={level}",
                        f"compensation.rounding={rounding}",
                        f"compensation.token_weights={tokens}",
                        f"compensation.num_blocks={blocks}",
                        f"compensation.pack={pack}",
                        f"compensation.ridge={ridge}",
                    ],
                )
                how = "/".join([level, *[rounding] * rounded, *[tokens] * (level != "none")])
                print(f"{criterion:9} {keep_n:2}  {how:26} {line}", flush=True)


if __name__ == "__main__":
    main()
