"""REAP by llm-compressor, for `peers.py`: runs where that is installed, imports nothing of ours.

    python benchmarks/peers_llmcompressor.py MODEL TOKENS.npy --started T --out DIR --experts E
        --keep-n N [--mask causal] [--behind whole] [--batch 2]

TOKENS.npy: ids [B, S] without padding. The recipe is its authors' (issue 3094 of llm-compressor):
sequential pipeline, `moe_calibrate_all_experts=False`, weights in the checkpoint's own type.

As it comes 0.14.0.1 measures with attention to later tokens where nothing is padded: the config it
traces with has lost that attention is eager, so no mask is made. `--mask causal` hands one in. Each
layer is measured behind layers that are pruned already; `--behind whole` (`propagate_error=False`)
measures it in the whole model, as the paper does (arXiv:2510.13999). Prints one line of JSON:
seconds since T (of the clock), CPU seconds, those of the modifier, most memory held, kept experts,
versions.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from llmcompressor import oneshot  # type: ignore[import-not-found]
from llmcompressor.modifiers.pruning import REAPPruningModifier  # type: ignore[import-not-found]
from llmcompressor.utils import load_context  # type: ignore[import-not-found]
from peers_floor import peak_gb
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoModelForCausalLM, AutoTokenizer


def forget_aliases() -> None:
    """Loading lists every module of transformers, and its modules of old names want torchvision."""
    for name, module in list(sys.modules.items()):
        if name.startswith("transformers.") and vars(module).get("__file__", "") is None:
            del sys.modules[name]


def layer(name: str) -> int:
    """Number of a module's layer."""
    return int(name.split("layers.")[1].split(".")[0])


def inputs(
    rows: list[tuple[torch.Tensor]], mask: str, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """A batch of rows without padding; causal: what is added to attention, [1, 1, S, S]."""
    ids = torch.stack([row for (row,) in rows])
    if mask == "padding":
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    later = torch.full((1, 1, ids.shape[1], ids.shape[1]), torch.finfo(dtype).min, dtype=dtype)
    return {"input_ids": ids, "attention_mask": later.triu(1)}


def main() -> None:
    """Prune, save, and say what it took."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("--started", type=float, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--experts", type=int, required=True)
    parser.add_argument("--keep-n", type=int, required=True)
    parser.add_argument("--mask", choices=("padding", "causal"), default="padding")
    parser.add_argument("--behind", choices=("pruned", "whole"), default="pruned")
    parser.add_argument("--batch", type=int, default=2)
    asked = parser.parse_args()
    forget_aliases()
    with load_context():
        model = AutoModelForCausalLM.from_pretrained(
            asked.model, dtype="auto", trust_remote_code=False
        )
    tokenizer = AutoTokenizer.from_pretrained(asked.model, trust_remote_code=False)
    ids = torch.from_numpy(np.load(asked.tokens)).long()
    collate = partial(inputs, mask=asked.mask, dtype=model.dtype)
    batches = DataLoader(TensorDataset(ids), batch_size=asked.batch, collate_fn=collate)
    report = asked.out.with_suffix(".json")
    # of the experts times the sparsity it drops the whole number below
    sparsity = (asked.experts - asked.keep_n + 0.5) / asked.experts
    loaded = time.process_time()
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=batches,
        recipe=REAPPruningModifier(sparsity=sparsity, report_path=str(report)),
        pipeline="sequential",
        moe_calibrate_all_experts=False,
        propagate_error=asked.behind == "pruned",
    )
    chosen = time.process_time()
    model.save_pretrained(asked.out)
    tokenizer.save_pretrained(asked.out)
    retained = json.loads(report.read_text())
    found = {
        "choosing": chosen - loaded,
        "cpu": time.process_time(),
        "seconds": time.time() - asked.started,
        "peak_gb": peak_gb(),
        "kept": [retained[name] for name in sorted(retained, key=layer)],
        "versions": {name: version(name) for name in ("llmcompressor", "transformers", "torch")},
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
