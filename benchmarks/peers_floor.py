"""transformers' own forward, the floor of `peers.py`; imports nothing of ours.

    python benchmarks/peers_floor.py MODEL TOKENS.npy --started T [--dtype auto] [--batch 2]

Reads the checkpoint and puts the tokens (ids [B, S]) through the model once, logits and all. Prints
one line of JSON: seconds since T (of the clock), CPU seconds, those of the forwards, most memory.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM


def peak_gb() -> float:
    """Most memory this process held; getrusage would tell of its parent where that held more."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e9


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Read, run, and say what it took."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("--started", type=float, required=True)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--batch", type=int, default=2)
    asked = parser.parse_args(arguments)
    model = AutoModelForCausalLM.from_pretrained(
        asked.model, dtype=asked.dtype, trust_remote_code=False
    ).eval()
    ids = torch.from_numpy(np.load(asked.tokens)).long()
    loaded = time.process_time()
    with torch.inference_mode():
        for some in torch.split(ids, asked.batch):
            model(input_ids=some, use_cache=False)
    found = {
        "choosing": time.process_time() - loaded,
        "cpu": time.process_time(),
        "seconds": time.time() - asked.started,
        "peak_gb": peak_gb(),
    }
    print(json.dumps(found))
    return found


if __name__ == "__main__":
    main()
