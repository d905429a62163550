"""Perplexity lost by a plan without and with compensation, on blocks that nothing was fitted on.

    python benchmarks/compensation.py [SETTING=VALUE ...]
        [--keep-n 28 24 20 16] [--criteria reap eaft_reap]
        [--levels none bias down_proj experts] [--roundings nearest feedback] [--unquantised]
        [--token-weights robust uniform] [--blocks 64] [--packs UNION] [--ridges auto]
        [--passes 2] [--seeds 0] [--eval-blocks 32] [--seq-len 1024] [--home DIR]

One line a variant and seed (of the rows profiled, calibrated and evaluated on): PPL of UNION and of
each pack minus the base's, in percent; means over layers of the last pass's residuals (fitted rows
as stored, held-out rows as stored, by a fit on half of the others); nats of held-out rows from the
base's predictions after each pass; the ridges; tokens; seconds to compensate. Then by variant the
share of the loss that is left, with `none` among the levels and several seeds the mean and the
reach of its 95% interval. --unquantised does the same to a copy of the model with experts in
bfloat16, so that nothing is rounded to MXFP4.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from runs import finished
from runs import settings as checked

from eaft_prune.checkpoints.read import open_model
from eaft_prune.checkpoints.slice import copy_file, write_text
from eaft_prune.engines.packed import dequantize
from eaft_prune.maths.intervals import student
from eaft_prune.packs import sources


@dataclass(frozen=True)
class Variant:
    """What one way to compensate lost and left."""

    lost: dict[str, float]  # 100 (PPL / PPL_base - 1) of UNION and each pack
    facts: dict[str, Any]  # of the compensation; empty where there was none
    seconds: float  # to compensate

    def __str__(self) -> str:
        text = "  ".join(f"{pack[:9]:>9} {percent:+6.2f}%" for pack, percent in self.lost.items())
        if facts := self.facts:
            text += f"  residual {facts['residual']:.3f} held {facts['held_out']:.3f} half "
            text += f"{facts['held_out_by_half']:.3f}  nats "
            text += " ".join(f"{nats:.4f}" for nats in facts["distances"])
            text += f"  ridges {facts['ridges']}  "
            text += f"{facts['scored_tokens']:,} tokens  {self.seconds:.0f} s"
        return text


def variant(home: Path, settings: Sequence[str]) -> Variant:
    """The whole pipeline with these settings."""
    result = finished([*settings, "eval.candidates=[pruned]"], home)
    reports = result["reports"]
    lost = {
        pack: 100 * (report["ppl"] / reports["base"][pack][length]["ppl"] - 1)
        for pack, lengths in reports["pruned"].items()
        for length, report in lengths.items()
    }
    for stage in result["stages"]:
        if stage["stage"] == "compensate":
            return Variant(lost, stage["facts"], stage["seconds"])
    return Variant(lost, {}, 0.0)


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


def shares(found: Mapping[str, Mapping[int, Variant]]) -> dict[str, dict[str, float]]:
    """Of every variant and pack the mean share left of the loss of `none`; prints reaches too."""
    out: dict[str, dict[str, float]] = {}
    for name, by_seed in found.items():
        none = found.get(" ".join([*name.split()[:2], "none"]), {})
        if not none or by_seed is none:
            continue
        cells = dict[str, float]()
        for pack in next(iter(by_seed.values())).lost:
            left = [one.lost[pack] / none[seed].lost[pack] for seed, one in by_seed.items()]
            cells[pack] = statistics.mean(left)
            reach = math.nan
            if len(left) > 1:
                reach = student(0.975, len(left)) * statistics.stdev(left) / math.sqrt(len(left))
            print(f"{name:60} {pack:16} {cells[pack]:6.3f} +- {reach:.3f} left", flush=True)
        out[name] = cells
    return out


def main(arguments: Sequence[str] | None = None) -> dict[str, Variant]:
    """Every line of the table of the last seed by criterion, keep_n and how it was compensated."""
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
    parser.add_argument("--passes", nargs="*", type=int, default=[2])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--eval-blocks", type=int, default=32)
    parser.add_argument("--home", type=Path, default=Path(tempfile.gettempdir()) / "compensation")
    parser.add_argument("--seq-len", type=int, default=1024, help="of the evaluation")
    given, settings = parser.parse_known_args(arguments)
    found: dict[str, dict[int, Variant]] = {}
    settings += [f"eval.num_blocks={given.eval_blocks}", f"eval.seq_lens=[{given.seq_len}]"]
    settings += [f"gate.seq_lens=[{given.seq_len}]"]
    if given.unquantised:
        model = sources.model_path(checked(settings).model)
        copy = unquantised(model, given.home / "unquantised")
        settings += ["model=local", "model.name=bfloat16", f"model.path={copy}"]
    for seed, criterion, keep_n in itertools.product(given.seeds, given.criteria, given.keep_n):
        drawn = [f"{part}.seed={seed}" for part in ("profile", "compensation", "eval")]
        for level in given.levels:
            for how in ways(given, level):
                name = f"{criterion} {keep_n} {named(level, how)}"
                whole = [f"pruning={criterion}", f"pruning.keep_n={keep_n}"]
                whole.append(f"pruning.compensation={level}")
                line = variant(given.home, [*settings, *drawn, *whole, *how])
                found.setdefault(name, {})[seed] = line
                print(f"seed {seed}  {name:60} {line}", flush=True)
    shares(found)
    return {name: by_seed[given.seeds[-1]] for name, by_seed in found.items()}


def ways(given: argparse.Namespace, level: str) -> Iterator[list[str]]:
    """Settings of every way asked for to compensate at a level."""
    if level == "none":
        yield []
        return
    rounded = level in ("down_proj", "experts") and not given.unquantised
    choices = {
        "rounding": given.roundings if rounded else ["nearest"],
        "token_weights": given.token_weights,
        "num_blocks": given.blocks,
        "pack": given.packs,
        "ridge": given.ridges,
        "passes": given.passes,
    }
    for values in itertools.product(*choices.values()):
        yield [f"compensation.{key}={v}" for key, v in zip(choices, values, strict=True)]


def named(level: str, how: Sequence[str]) -> str:
    """A way to compensate in short."""
    return "/".join([level, *(setting.split("=")[1] for setting in how)])


if __name__ == "__main__":
    main()
