"""Tokens written per second by our engine and by transformers' own generate, and where they differ.

    python benchmarks/generation_speed.py [--path DIR] [--device cpu] [--dtype float32]
        [--prompts 16] [--longest 256] [--new 128] [--repeats 3]

Both write greedily on after the same prompts, at once, padded on the left; nothing ends a text.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from common import device_of, seconds, untold
from common import options as engine_options

from eaft_prune.checkpoints.read import open_model
from eaft_prune.config import ModelSettings, RuntimeSettings
from eaft_prune.core.generation import Decoding
from eaft_prune.engines.loading import load_files
from eaft_prune.packs.sources import model_path


def theirs(path: str, device: torch.device, dtype: str) -> Any:
    """transformers as it comes."""
    from transformers import AutoModelForCausalLM, Mxfp4Config

    model = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=getattr(torch, dtype),
        trust_remote_code=False,
        quantization_config=Mxfp4Config(dequantize=True),
        attn_implementation="eager",
    ).eval()
    model.generation_config.eos_token_id = None
    return model.to(device)


def padded(prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask [P, S], prompts at the right."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(some)) + list(some) for some in prompts])
    mask = torch.tensor([[0] * (width - len(some)) + [1] * len(some) for some in prompts])
    return ids, mask


def main(arguments: Sequence[str] | None = None) -> tuple[dict[str, float], float]:
    """Tokens per second of each, and the share of texts that are equal."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--path", default="demo:checkpoint")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--longest", type=int, default=256)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args(arguments)
    path = model_path(ModelSettings(name="model", path=args.path))
    device = device_of(args.device)
    runtime = RuntimeSettings(store_dir="", checkpoint_dir="", device=args.device, dtype=args.dtype)
    ours = load_files(open_model(path), engine_options(runtime))
    other = theirs(str(path), device, args.dtype)
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, args.longest + 1, args.prompts)
    prompts = [rng.integers(1, other.config.vocab_size, n).tolist() for n in lengths]
    ids, mask = (part.to(device) for part in padded(prompts))
    how = Decoding(args.new, ())
    found: dict[str, list[list[int]]] = {}

    def us() -> None:
        found["ours"], _ = ours.generate(prompts, how, 0, untold)

    def them() -> None:
        out = other.generate(
            ids, attention_mask=mask, max_new_tokens=args.new, do_sample=False, pad_token_id=0
        )
        found["theirs"] = out[:, ids.shape[1] :].tolist()

    total = args.prompts * args.new
    rates = {
        name: total / seconds(run, args.repeats, device)
        for name, run in (("ours", us), ("transformers' generate", them))
    }
    equal = sum(a == b for a, b in zip(found["ours"], found["theirs"], strict=True))
    for name, rate in rates.items():
        print(f"{name}: {rate:,.0f} tokens/s")
    print(f"{equal} of {args.prompts} texts of {args.new} tokens are equal")
    return rates, equal / args.prompts


if __name__ == "__main__":
    main()
