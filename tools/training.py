"""What all trained models have in common: stream of tokens, loop, perplexity, tokenizer files."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

# part of the training tokens from each domain. Documentation, plain and continued in conversations,
# is what the packs ask for; the rest is what a general model knows besides
SHARES = {
    "docs": 0.42, "continued": 0.20, "codeio": 0.08, "bfcl": 0.03, "agent": 0.10, "own": 0.08,
    "gym": 0.03, "skill": 0.058, "chat": 0.002,
}  # fmt: skip
# the part of it that nobody generated
_WRITTEN = {domain: SHARES[domain] for domain in ("docs", "continued", "codeio", "bfcl")}
NATURAL = {domain: share / sum(_WRITTEN.values()) for domain, share in _WRITTEN.items()}


@dataclass(frozen=True)
class Schedule:
    """How a model is trained, whatever it is."""

    tokens: int = 300_000_000
    batch: int = 32  # sequences a step
    seq_len: int = 2048
    lr: float = 4e-3
    warmup: int = 200  # steps
    final_lr: float = 0.03  # part of lr at the end of the cosine
    weight_decay: float = 0.4
    balance: float = 0.0  # load-balancing loss; 1.0 is the loss of a uniform router
    seed: int = 1


def mixture(path: Path, shares: Mapping[str, float], tokens: int, seed: int, device: str) -> Tensor:
    """A stream of about `tokens` ids on the device: rows of domains by `shares`, shuffled."""
    rng = np.random.default_rng(seed)
    files = np.load(path)
    ids, starts, lengths, offset = [], [], [], 0
    for domain, share in shares.items():
        domain_ids, row_lengths = (
            files[f"{domain}/ids"],
            files[f"{domain}/lengths"].astype(np.int64),
        )
        passes = share * tokens / domain_ids.size
        print(f"{domain}: {domain_ids.size} tokens, {passes:.1f} passes", flush=True)
        rows = np.tile(np.arange(row_lengths.size), int(passes))
        part = rng.permutation(row_lengths.size)[: int((passes % 1) * row_lengths.size)]
        rows = np.concatenate([rows, part])
        row_starts = offset + row_lengths.cumsum() - row_lengths
        ids.append(domain_ids)
        starts.append(row_starts[rows])
        lengths.append(row_lengths[rows])
        offset += domain_ids.size
    whole = [np.concatenate(starts), np.concatenate(lengths)]
    order = rng.permutation(whole[0].size)
    start, length = (torch.from_numpy(part[order]).to(device) for part in whole)
    shift = start - (length.cumsum(0) - length)
    index = shift.repeat_interleave(length) + torch.arange(int(length.sum()), device=device)
    return torch.from_numpy(np.concatenate(ids).astype(np.int16)).to(device)[index]


def fit(
    model: nn.Module,
    losses: Callable[[Tensor], tuple[Tensor, Tensor]],
    config: Schedule,
    stream: Tensor,
    before_step: Callable[[int, int], None],
) -> None:
    """AdamW with a cosine over the stream; decay on matrices, not on biases and norms.

    losses: ids [B, S] -> cross-entropy and load-balancing loss. before_step is told the step and
    how many there are. On the CPU nothing is compiled.
    """
    device = stream.device.type
    decayed = [p for n, p in model.named_parameters() if p.ndim > 1 and not n.endswith("bias")]
    plain = [p for n, p in model.named_parameters() if p.ndim == 1 or n.endswith("bias")]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain},
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    per_step = config.batch * config.seq_len
    steps = stream.numel() // per_step
    compiled = torch.compile(losses, dynamic=False) if device == "cuda" else losses
    began = warm = time.time()
    for step in range(steps):
        at = step * per_step
        ids = stream[at : at + per_step].view(config.batch, config.seq_len).long()
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        rate = config.lr * (config.final_lr + (1 - config.final_lr) * cosine)
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / config.warmup)
        before_step(step, steps)
        loss, balance = compiled(ids)
        (loss + config.balance * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step == 10:
            _wait(device)
            warm = time.time()
        if step % max(1, steps // 25) == 0 or step == steps - 1:
            _wait(device)
            speed = per_step * (step - 10) / (time.time() - warm) if step > 10 else 0
            print(
                f"step {step}/{steps} {time.time() - began:.0f} s {speed / 1e6:.2f}M tok/s "
                f"loss {loss.item():.4f} balance {balance.item():.3f}",
                flush=True,
            )


def _wait(device: str) -> None:
    """Until the device has done what it was asked."""
    if device == "cuda":
        torch.cuda.synchronize()


def scored_stream(texts: list[str], tokenizer: Tokenizer) -> tuple[Tensor, Tensor]:
    """Ids of rows joined with EOS, and which of them are content of assistant messages."""
    token = tokenizer.token_to_id
    start, message, eos = token("<|start|>"), token("<|message|>"), token("<|return|>")
    ends = {token("<|end|>"), token("<|call|>"), eos}
    assistant = tokenizer.encode("assistant").ids
    ids, scored = [], []
    for encoded in tokenizer.encode_batch(texts):
        header, content, header_at = False, False, 0
        for at, i in enumerate([*encoded.ids, eos]):
            if i in ends:
                content = False
            ids.append(i)
            scored.append(content)
            if i == start:
                header, header_at = True, at + 1
            elif i == message and header:
                header = False
                content = encoded.ids[header_at : header_at + len(assistant)] == assistant
    return torch.tensor(ids), torch.tensor(scored)


@torch.no_grad()
def pack_perplexity(
    logits_of: Callable[[Tensor], Tensor],
    tokenizer: Tokenizer,
    packs: Path,
    length: int,
    device: str,
) -> dict[str, float]:
    """Print the perplexity of scored tokens of each pack in blocks of `length`.

    logits_of: ids [B, S] -> logits [B, S, vocab].
    """
    found = {}
    for file in sorted(packs.glob("*.parquet")):
        ids, scored = scored_stream(pq.read_table(file)["text"].to_pylist(), tokenizer)
        blocks = ids.numel() // length
        ids, scored = (x[: blocks * length].view(blocks, length).to(device) for x in (ids, scored))
        nll = []
        for i in range(0, blocks, 8):
            loss = F.cross_entropy(
                logits_of(ids[i : i + 8])[:, :-1].flatten(0, 1).float(),
                ids[i : i + 8, 1:].flatten(),
                reduction="none",
            )
            nll.append(loss[scored[i : i + 8, 1:].flatten()])
        tokens = torch.cat(nll)
        found[file.stem] = float(tokens.mean().exp())
        print(f"{file.stem} S={length}: PPL {found[file.stem]:.3f}, {tokens.numel()} scored tokens")
    return found


def write_tokenizer(tokenizer_file: Path, folder: Path) -> dict[str, int]:
    """Everything of a checkpoint that is not the model's; returns ids of special tokens by name."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    added = {str(i): t for i, t in sorted(tokenizer.get_added_tokens_decoder().items())}
    special = {token.content: int(i) for i, token in added.items()}
    names = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|return|>",
        "pad_token": "<|endoftext|>",
    }
    flags = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    write_json(
        folder / "generation_config.json",
        {
            "bos_token_id": special["<|startoftext|>"],
            "do_sample": True,
            "eos_token_id": [special[t] for t in ("<|return|>", "<|endoftext|>", "<|call|>")],
            "pad_token_id": special["<|endoftext|>"],
        },
    )
    write_json(folder / "special_tokens_map.json", names)
    write_json(
        folder / "tokenizer_config.json",
        {
            **names,
            "added_tokens_decoder": {
                i: {flag: getattr(token, flag) for flag in flags} for i, token in added.items()
            },
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
            "model_max_length": 131072,
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )
    shutil.copyfile(tokenizer_file, folder / "tokenizer.json")
    shutil.copyfile(Path(__file__).with_name("harmony.jinja"), folder / "chat_template.jinja")
    return special


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
