"""Train the demo checkpoint on one GPU, round its experts to MXFP4 and write the folder.

    python tools/train_demo_model.py --data WORK --packs src/eaft_prune/demo/packs --out DIR

WORK is the output of tools/demo_data.py. The last quarter of the training sees rounded experts
(straight-through), so the written 4-bit weights are the ones that were trained. Prints the
perplexity of the written weights on the packs, none of whose rows is in the training data.
--device cpu is to try it at a tiny size.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from demo_model import (
    DemoModel,
    Mask,
    ModelConfig,
    block_masks,
    dense_masks,
    mxfp4_codes,
    mxfp4_pack,
    mxfp4_values,
)
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

# part of the training tokens from each domain. Documentation, plain and continued in conversations,
# is what the packs ask for; the rest is what a general model knows besides
SHARES = {
    "docs": 0.42, "continued": 0.20, "codeio": 0.08, "bfcl": 0.03, "agent": 0.10, "own": 0.08,
    "gym": 0.03, "skill": 0.058, "chat": 0.002,
}  # fmt: skip


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run besides the data."""

    tokens: int = 300_000_000
    batch: int = 32  # sequences a step
    seq_len: int = 2048
    lr: float = 4e-3
    warmup: int = 200  # steps
    final_lr: float = 0.03  # part of lr at the end of the cosine
    weight_decay: float = 0.4
    balance: float = 0.0  # load-balancing loss; 1.0 is the loss of a uniform router
    router_noise: float = 1.5  # standard deviation of the normal noise on router logits
    expert_dropout: float = 0.05  # part of the experts of a layer that a sequence cannot use
    quantise_from: float = 0.75  # part of the run after which experts are rounded
    seed: int = 1


# ---------------------------------------------------------------- training


def mixture(path: Path, tokens: int, seed: int, device: str) -> Tensor:
    """A stream of about `tokens` ids on the device: rows of all domains by SHARES, shuffled."""
    rng = np.random.default_rng(seed)
    files = np.load(path)
    ids, starts, lengths, offset = [], [], [], 0
    for domain, share in SHARES.items():
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


def train(config: TrainConfig, sizes: ModelConfig, data: Path, device: str) -> DemoModel:
    """Train a model from scratch; AdamW, cosine, float32 master weights, bf16 matmuls.

    On the CPU everything is float32, attention is plain and nothing is compiled.
    """
    torch.manual_seed(config.seed)
    cuda = device == "cuda"
    model = DemoModel(sizes).to(device)
    for layer in model.model.blocks:
        layer.mlp.noise, layer.mlp.dropout = config.router_noise, config.expert_dropout
    decayed = [p for n, p in model.named_parameters() if p.ndim > 1 and not n.endswith("bias")]
    plain = [p for n, p in model.named_parameters() if p.ndim == 1 or n.endswith("bias")]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain},
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    stream = mixture(data / "tokens.npz", config.tokens, config.seed, device)
    window, per_step = sizes.sliding_window, config.batch * config.seq_len
    masks: tuple[Mask, Mask] = (
        block_masks(config.seq_len, window) if cuda else dense_masks(config.seq_len, window, device)
    )
    steps = stream.numel() // per_step

    def losses(ids_BS: Tensor) -> tuple[Tensor, Tensor]:
        logits, balance = model(ids_BS, masks, torch.bfloat16 if cuda else torch.float32)
        return F.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), ids_BS[:, 1:].flatten()
        ), balance

    compiled = torch.compile(losses, dynamic=False) if cuda else losses
    began = warm = time.time()
    for step in range(steps):
        at = step * per_step
        ids = stream[at : at + per_step].view(config.batch, config.seq_len).long()
        progress = step / steps
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        rate = config.lr * (config.final_lr + (1 - config.final_lr) * cosine)
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / config.warmup)
        if step == int(config.quantise_from * steps):
            set_rounding(model, 1.0)
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
    return model


def _wait(device: str) -> None:
    """Until the device has done what it was asked."""
    if device == "cuda":
        torch.cuda.synchronize()


def set_rounding(model: DemoModel, amount: float) -> None:
    """Use rounded experts (1.0) or the master weights (0.0) in the forward."""
    for layer in model.model.blocks:
        layer.mlp.experts.quantised.fill_(amount)


# ---------------------------------------------------------------- checkpoint


@torch.no_grad()
def settle(model: DemoModel) -> None:
    """Give every parameter the value the checkpoint will hold: MXFP4 experts, bf16 the rest."""
    set_rounding(model.eval(), 0.0)
    for name, parameter in model.named_parameters():
        if is_quantised(name):
            parameter.copy_(mxfp4_values(*mxfp4_codes(parameter)))
        else:
            parameter.copy_(parameter.bfloat16().float())


def is_quantised(name: str) -> bool:
    """Only the two expert matrices are MXFP4."""
    return name.endswith(("experts.gate_up_proj", "experts.down_proj"))


def checkpoint_tensors(model: DemoModel) -> dict[str, Tensor]:
    """The tensors of a published gpt-oss checkpoint."""
    tensors = {}
    for name, parameter in model.named_parameters():
        value = parameter.detach().cpu()
        if is_quantised(name):
            tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = (
                part.contiguous() for part in mxfp4_pack(*mxfp4_codes(value))
            )
        else:
            tensors[name] = value.bfloat16()
    return tensors


def config_json(c: ModelConfig, special: dict[str, int]) -> dict[str, Any]:
    """config.json with the keys of openai/gpt-oss-20b."""
    kinds = [
        "sliding_attention" if c.is_sliding(i) else "full_attention" for i in range(c.num_layers)
    ]
    return {
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "bos_token_id": special["<|startoftext|>"],
        "dtype": "bfloat16",
        "eos_token_id": special["<|return|>"],
        "experts_per_token": c.top_k,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "hidden_size": c.hidden_size,
        "initial_context_length": c.yarn_original,
        "initializer_range": 0.02,
        "intermediate_size": c.intermediate_size,
        "layer_types": kinds,
        "max_position_embeddings": int(c.yarn_original * c.yarn_factor),
        "model_type": "gpt_oss",
        "num_attention_heads": c.num_heads,
        "num_experts_per_tok": c.top_k,
        "num_hidden_layers": c.num_layers,
        "num_key_value_heads": c.num_kv_heads,
        "num_local_experts": c.num_experts,
        "output_router_logits": False,
        "pad_token_id": special["<|endoftext|>"],
        "quantization_config": {
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
            "quant_method": "mxfp4",
        },
        "rms_norm_eps": c.rms_eps,
        "rope_scaling": {
            "beta_fast": c.yarn_beta_fast,
            "beta_slow": c.yarn_beta_slow,
            "factor": c.yarn_factor,
            "original_max_position_embeddings": c.yarn_original,
            "rope_type": "yarn",
            "truncate": False,
        },
        "rope_theta": c.rope_theta,
        "sliding_window": c.sliding_window,
        "swiglu_limit": c.swiglu_limit,
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": c.vocab_size,
    }


def write_checkpoint(model: DemoModel, tokenizer_file: Path, folder: Path, shards: int = 2) -> None:
    """Write weights in shards with an index, the config, and all tokenizer files."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = checkpoint_tensors(model)
    size = {name: t.numel() * t.element_size() for name, t in tensors.items()}
    total, used, where = sum(size.values()), 0, {}
    for name in sorted(tensors):  # fill the shards one after the other
        shard = min(shards, 1 + used * shards // total)
        where[name] = f"model-{shard:05d}-of-{shards:05d}.safetensors"
        used += size[name]
    for file in sorted(set(where.values())):
        part = {name: tensors[name] for name in tensors if where[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)
    index = {"metadata": {"total_size": total}, "weight_map": where}
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    added = {str(i): t for i, t in sorted(tokenizer.get_added_tokens_decoder().items())}
    special = {token.content: int(i) for i, token in added.items()}
    names = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|return|>",
        "pad_token": "<|endoftext|>",
    }
    flags = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    texts = {
        "model.safetensors.index.json": index,
        "config.json": config_json(model.c, special),
        "generation_config.json": {
            "bos_token_id": special["<|startoftext|>"],
            "do_sample": True,
            "eos_token_id": [special[t] for t in ("<|return|>", "<|endoftext|>", "<|call|>")],
            "pad_token_id": special["<|endoftext|>"],
        },
        "special_tokens_map.json": names,
        "tokenizer_config.json": {
            **names,
            "added_tokens_decoder": {
                i: {flag: getattr(token, flag) for flag in flags} for i, token in added.items()
            },
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
            "model_max_length": 131072,
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    }
    for file, value in texts.items():
        (folder / file).write_text(json.dumps(value, indent=2) + "\n")
    shutil.copyfile(tokenizer_file, folder / "tokenizer.json")
    shutil.copyfile(Path(__file__).with_name("harmony.jinja"), folder / "chat_template.jinja")


# ---------------------------------------------------------------- perplexity on the packs


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
    model: DemoModel, tokenizer: Tokenizer, packs: Path, length: int
) -> dict[str, float]:
    """Print the perplexity of scored tokens of each pack in blocks of `length`."""
    device = str(model.lm_head.weight.device)
    masks, found = dense_masks(length, model.c.sliding_window, device), {}
    for file in sorted(packs.glob("*.parquet")):
        ids, scored = scored_stream(pq.read_table(file)["text"].to_pylist(), tokenizer)
        blocks = ids.numel() // length
        ids, scored = (x[: blocks * length].view(blocks, length).to(device) for x in (ids, scored))
        nll = []
        for i in range(0, blocks, 8):
            logits, _ = model(ids[i : i + 8], masks)
            loss = F.cross_entropy(
                logits[:, :-1].flatten(0, 1), ids[i : i + 8, 1:].flatten(), reduction="none"
            )
            nll.append(loss[scored[i : i + 8, 1:].flatten()])
        tokens = torch.cat(nll)
        found[file.stem] = float(tokens.mean().exp())
        print(f"{file.stem} S={length}: PPL {found[file.stem]:.3f}, {tokens.numel()} scored tokens")
    return found


def main(arguments: Sequence[str] | None = None) -> dict[int, dict[str, float]]:
    """Train, round, write, measure: perplexity by length and pack."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="output of tools/demo_data.py")
    parser.add_argument("--packs", type=Path, default=Path("src/eaft_prune/demo/packs"))
    parser.add_argument("--out", type=Path, required=True, help="checkpoint folder to write")
    for field in (*fields(TrainConfig), *fields(ModelConfig)):
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, type=type(field.default), default=field.default)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048])
    args = parser.parse_args(arguments)
    config = TrainConfig(**{field.name: getattr(args, field.name) for field in fields(TrainConfig)})
    sizes = ModelConfig(**{field.name: getattr(args, field.name) for field in fields(ModelConfig)})
    print(config, sizes, flush=True)
    tokenizer = Tokenizer.from_file(str(args.data / "tokenizer.json"))
    if sizes.vocab_size != tokenizer.get_vocab_size():
        parser.error(
            f"--vocab-size {sizes.vocab_size}: {args.data} has {tokenizer.get_vocab_size()}"
        )
    model = train(config, sizes, args.data, args.device)
    settle(model)
    write_checkpoint(model, args.data / "tokenizer.json", args.out)
    return {
        length: pack_perplexity(model, tokenizer, args.packs, length) for length in args.lengths
    }


if __name__ == "__main__":
    main()
