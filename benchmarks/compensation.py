"""Perplexity lost by a plan without and with compensation, on blocks that nothing was fitted on.

    python benchmarks/compensation.py [SETTING=VALUE ...]
        [--keep-n 28 24 20 16] [--criteria reap eaft_reap]
        [--levels none bias down_proj experts] [--roundings nearest feedback] [--unquantised]
        [--token-weights robust uniform] [--blocks 64] [--packs UNION] [--ridges auto]
        [--eval-blocks 32] [--seq-len 1024] [--home DIR]

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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from runs import finished
from runs import settings as checked

from eaft_prune.checkpoints.read import open_model
from eaft_prune.checkpoints.slice import copy_file, write_text
from eaft_prune.engines.packed import dequantize
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
            text += f"{facts['held_out_by_half']:.3f}  ridges {facts['ridges']}  "
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


def main(arguments: Sequence[str] | None = None) -> dict[str, Variant]:
    """Every line of the table by criterion, keep_n and how it was compensated."""
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
    parser.add_argument("--seq-len", type=int, default=1024, help="of the evaluation")
    given, settings = parser.parse_known_args(arguments)
    found: dict[str, Variant] = {}
    settings += [f"eval.num_blocks={given.eval_blocks}", f"eval.seq_lens=[{given.seq_len}]"]
    settings += [f"gate.seq_lens=[{given.seq_len}]"]
    if given.unquantised:
        model = sources.model_path(checked(settings).model)
        copy = unquantised(model, given.home / "unquantised")
        settings += ["model=local", "model.name=bfloat16", f"model.path={copy}"]
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
                if level != "none":
                    how += f"/{blocks} of {pack}/{ridge}"
                found[f"{criterion} {keep_n} {how}"] = line
                print(f"{criterion:9} {keep_n:2}  {how:44} {line}", flush=True)
    return found


if __name__ == "__main__":
    main()
