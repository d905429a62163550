"""REAP by us and by llm-compressor: the same model, tokens and sizes, each in its own process.

    python benchmarks/peers.py --model DIR --peer-python OTHER/bin/python --keep-n 56 48
        [--blocks 64] [--eval-blocks 64] [--seq-len 1024] [--write benchmarks/README.md]
        [-- SETTING=VALUE ...]

DIR holds a checkpoint of transformers; OTHER is an environment with llm-compressor (without
--peer-python it is left out). Everybody reads the same profiling blocks, with the precision and
batches that are its own: llm-compressor as it comes, with a causal mask that it lacks otherwise
(`peers_llmcompressor.py`), and told to measure each layer in the whole model besides; ours as it
comes, and by the paper's formula alone over all but what predicts separators, as that last one
does over all (`packs.format=plain pruning.core_pos_top_m=0`). We evaluate checkpoints on blocks of
rows that nobody saw. One table: PPL against the whole model's and against llm-compressor's in %,
with 95% intervals over conversations; how many experts are kept that llm-compressor drops in those
three ways; from the start of the process to the checkpoint seconds and CPU seconds, of these those
of forwards and choosing; most memory; whether every weight is, bit by bit, the base's.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from methods import written
from runs import session, settings
from study import Values, evaluated, interval, moved
from transformers import AutoModelForCausalLM

from eaft_prune.core.quiet import quiet
from eaft_prune.core.types import KeepPlan
from eaft_prune.pipeline.candidates import opened
from eaft_prune.pipeline.requests import profiling

HERE = Path(__file__).parent
THEIRS = "llm-compressor"
MASKED = "llm-compressor, given a causal mask"
WHOLE = "llm-compressor, and each layer in the whole model"
HOW = {
    THEIRS: (),
    MASKED: ("--mask", "causal"),
    WHOLE: ("--mask", "causal", "--behind", "whole"),
}
EVERY = "REAP mean, every token"
PLAIN = ("packs.format=plain", "pruning.core_pos_top_m=0")
OURS = ("REAP mean", "REAP sum", "EAFT-REAP")
HEAD = (
    "keep", "who", "PPL, %", "to llm-compressor's, %", "experts it drops", "seconds", "CPU seconds",
    "choosing", "GB", "weights the base's",
)  # fmt: skip


@dataclass(frozen=True)
class Pruned:
    """One checkpoint that somebody wrote, and what that took."""

    who: str
    keep_n: int
    path: Path
    plan: KeepPlan
    facts: dict[str, Any]


def cost(facts: dict[str, Any]) -> list[str]:
    """Cells."""
    times = [f"{facts[name]:.1f}" for name in ("seconds", "cpu", "choosing")]
    return [*times, f"{facts['peak_gb']:.2f}"]


def told(python: str, script: str, *arguments: object) -> Any:
    """What a script says in its last line, of its own process and clock; raises SystemExit."""
    clock = ["--started", str(time.time())]
    done = subprocess.run(
        [python, str(HERE / script), *clock, *map(str, arguments)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{script} by {python} ended with {done.returncode}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def theirs(asked: argparse.Namespace, tokens: Path, n_experts: int, home: Path) -> list[Pruned]:
    """llm-compressor's checkpoints: a run each."""
    found: list[Pruned] = []
    for keep_n in asked.keep_n:
        for who, how in HOW.items():
            out = home / f"theirs-{len(found)}"
            facts = told(
                asked.peer_python, "peers_llmcompressor.py", asked.model, tokens, "--out", out,
                "--experts", n_experts, "--keep-n", keep_n, *how,
            )  # fmt: skip
            kept = KeepPlan(tuple(map(tuple, facts["kept"])), n_experts)
            found.append(Pruned(who, keep_n, out, kept, facts))
    if found:
        print("llm-compressor's environment:", found[0].facts["versions"], flush=True)
    return found


def ours(
    asked: argparse.Namespace, common: Sequence[str], n_experts: int, home: Path
) -> list[Pruned]:
    """Our checkpoints: a process where every token counts, one for those of the assistant."""
    found = []
    sides: dict[str, tuple[Sequence[str], Sequence[str]]] = {
        "every": ([EVERY], PLAIN),
        "said": (OURS, []),
    }
    for side, (names, more) in sides.items():
        methods = [name.removesuffix(", every token") for name in names]
        said = told(
            sys.executable, "peers_ours.py", "--home", home / side, "--keep-n", *asked.keep_n,
            "--methods", *methods, "--", *common, *more,
        )  # fmt: skip
        label = dict(zip(methods, names, strict=True))
        found += [
            Pruned(
                f"ours, {label[one['method']]}", one["keep_n"], Path(one["path"]),
                KeepPlan(tuple(map(tuple, one["kept"])), n_experts), one,
            )
            for one in said
        ]  # fmt: skip
    return found


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint as transformers holds it, in the type it is stored in."""
    with quiet(bar=False):
        model = AutoModelForCausalLM.from_pretrained(path, dtype="auto", trust_remote_code=False)
    found: dict[str, torch.Tensor] = model.state_dict()
    return found


def same_weights(base: dict[str, torch.Tensor], pruned: Pruned, layers: Sequence[int]) -> bool:
    """Whether each tensor is the base's: of experts and routers those of the kept, bit by bit."""
    found = tensors(pruned.path)
    kept = dict(zip(layers, pruned.plan.kept, strict=True))
    for name, whole in base.items():
        if ".mlp.experts." in name or ".mlp.gate." in name:
            whole = whole[list(kept[int(name.split(".")[2])])]
        other = found.pop(name)
        if other.dtype != whole.dtype or other.shape != whole.shape:
            return False
        if not torch.equal(bits(other), bits(whole)):
            return False
    return not found


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes: values that are equal may differ in them."""
    return tensor.contiguous().view(torch.uint8)


def percent(found: dict[str, float]) -> str:
    """A loss in nats as a change of PPL in %, its reach that of the nats times the slope."""
    ratio = math.exp(found["mean"])
    return f"{100 * (ratio - 1):+.2f} ± {100 * ratio * found['reach']:.2f}"


def row(
    one: Pruned, losses: dict[Path, Values], tokens_C: Any, peers: dict[str, Pruned], same: bool
) -> list[str]:
    """Of the table."""
    dropped = ", ".join(str(moved(one.plan, peer.plan)) for peer in peers.values())
    against = ""
    if THEIRS in peers and one.who != THEIRS:
        against = percent(interval((losses[one.path] - losses[peers[THEIRS].path])[None], tokens_C))
    lost = percent(interval(losses[one.path][None], tokens_C))
    costs = cost(one.facts)
    return [str(one.keep_n), one.who, lost, against, dropped, *costs, "yes" if same else "NO"]


def main(arguments: Sequence[str] | None = None) -> list[list[str]]:
    """The rows of the table."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("settings", nargs="*")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--peer-python")
    parser.add_argument("--keep-n", type=int, nargs="+", required=True)
    parser.add_argument("--blocks", type=int, default=64)
    parser.add_argument("--eval-blocks", default="64")
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--write", type=Path)
    asked = parser.parse_args(arguments)
    common = [
        "model=local", f"model.path={asked.model}", "runtime.progress=false",
        f"profile.num_blocks={asked.blocks}", f"profile.seq_len={asked.seq_len}",
        f"eval.num_blocks={asked.eval_blocks}", f"eval.seq_lens=[{asked.seq_len}]",
        f"gate.seq_lens=[{asked.seq_len}]", *asked.settings,
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        rows = compared(asked, common, Path(temporary))
    lines = [" | ".join(cells) for cells in (HEAD, ["---"] * 2 + ["---:"] * (len(HEAD) - 2), *rows)]
    text = "\n".join(f"| {line} |" for line in lines)
    if not asked.peer_python:
        text += "\n\nllm-compressor was left out: no --peer-python."
    print(text)
    if asked.write:
        written(asked.write, text, "peers")
    return rows


def compared(asked: argparse.Namespace, common: Sequence[str], home: Path) -> list[list[str]]:
    """Everybody prunes, one after the other; then each checkpoint is judged."""
    experiment = settings(common)
    working = session(experiment, home / "store")
    place, _ = evaluated(working)
    ids_BS = working.blocks(place.base, profiling(experiment, experiment.profile.seed)).value.ids_BS
    check_same_tokens([*common, *PLAIN], ids_BS, home)
    tokens = home / "tokens.npy"
    np.save(tokens, ids_BS[:, :-1])  # the last is to us what is predicted, and routed by nobody
    rows = []
    for dtype in dict.fromkeys((place.base.files.config["dtype"], "float32")):
        facts = told(sys.executable, "peers_floor.py", asked.model, tokens, "--dtype", dtype)
        rows.append(["all", f"transformers' forward, {dtype}", "", "", "", *cost(facts), ""])
    n_experts = place.base.n_experts
    found = theirs(asked, tokens, n_experts, home) if asked.peer_python else []
    found += ours(asked, common, n_experts, home)
    whole = tensors(asked.model)
    layers = place.base.family.layer_numbers(place.base.files.config)
    losses: dict[Path, Values] = {}
    for one in found:
        model = opened(working, place.base, str(one.path), "pruned")
        losses[one.path], _ = place.loss(str(one.path), model, None)
    tokens_C = np.bincount(place.row_T)
    print(
        f"chosen on {ids_BS.size:,} tokens; judged on {int(tokens_C.sum()):,} scored tokens of "
        f"{len(tokens_C)} conversations, whole model's PPL {math.exp(place.base_nll_T.mean()):.3f}"
    )
    for keep_n in asked.keep_n:
        some = [one for one in found if one.keep_n == keep_n]
        peers = {one.who: one for one in some if one.who in HOW}
        rows += [
            row(one, losses, tokens_C, peers, same_weights(whole, one, layers)) for one in some
        ]
    return rows


def check_same_tokens(arguments: Sequence[str], ids_BS: Any, home: Path) -> None:
    """Raises SystemExit where rows read as plain text are other tokens."""
    experiment = settings(arguments)
    place = session(experiment, home / "store")
    blocks = place.blocks(place.base(), profiling(experiment, experiment.profile.seed))
    if not np.array_equal(blocks.value.ids_BS, ids_BS):
        raise SystemExit("with packs.format=plain the profiling blocks hold other tokens")


if __name__ == "__main__":
    main()
