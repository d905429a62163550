"""Train the demo checkpoint on one GPU, round its experts to MXFP4 and write the folder.

    python tools/train_demo_model.py --data WORK --packs src/eaft_prune/demo/packs --out DIR

WORK is the output of tools/demo_data.py. The last quarter of the training sees rounded experts
(straight-through), so the written 4-bit weights are the ones that were trained. Prints the
perplexity of the written weights on the packs, none of whose rows is in the training data.
--device cpu is to try it at a tiny size.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

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
from training import (
    SHARES,
    Schedule,
    fit,
    mixture,
    pack_perplexity,
    write_json,
    write_tokenizer,
)


@dataclass(frozen=True)
class TrainConfig(Schedule):
    """Everything that decides a run besides the data."""

    router_noise: float = 1.5  # standard deviation of the normal noise on router logits
    expert_dropout: float = 0.05  # part of the experts of a layer that a sequence cannot use
    quantise_from: float = 0.75  # part of the run after which experts are rounded


# ---------------------------------------------------------------- training


def train(config: TrainConfig, sizes: ModelConfig, stream: Tensor) -> DemoModel:
    """Train a model from scratch; float32 master weights, bf16 matmuls.

    On the CPU everything is float32 and attention is plain.
    """
    torch.manual_seed(config.seed)
    device = stream.device.type
    cuda, window = device == "cuda", sizes.sliding_window
    model = DemoModel(sizes).to(device)
    for layer in model.model.blocks:
        layer.mlp.noise, layer.mlp.dropout = config.router_noise, config.expert_dropout
    masks: tuple[Mask, Mask] = (
        block_masks(config.seq_len, window) if cuda else dense_masks(config.seq_len, window, device)
    )

    def losses(ids_BS: Tensor) -> tuple[Tensor, Tensor]:
        logits, balance = model(ids_BS, masks, torch.bfloat16 if cuda else torch.float32)
        return F.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), ids_BS[:, 1:].flatten()
        ), balance

    def round_late(step: int, steps: int) -> None:
        if step == int(config.quantise_from * steps):
            set_rounding(model, 1.0)

    fit(model, losses, config, stream, round_late)
    return model


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
    special = write_tokenizer(tokenizer_file, folder)
    write_json(folder / "config.json", config_json(model.c, special))
    index = {"metadata": {"total_size": total}, "weight_map": where}
    write_json(folder / "model.safetensors.index.json", index)


def logits_in(model: DemoModel, masks: tuple[Mask, Mask]) -> Callable[[Tensor], Tensor]:
    """ids [B, S] -> logits, in float32."""

    def logits_of(ids_BS: Tensor) -> Tensor:
        logits: Tensor = model(ids_BS, masks)[0]
        return logits

    return logits_of


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
    stream = mixture(args.data / "tokens.npz", SHARES, config.tokens, config.seed, args.device)
    return make(config, sizes, stream, args)


def make(
    config: TrainConfig, sizes: ModelConfig, stream: Tensor, places: argparse.Namespace
) -> dict[int, dict[str, float]]:
    """Train, round, write, measure; places: data, packs, out and lengths of the command line."""
    print(config, sizes, flush=True)
    tokenizer = Tokenizer.from_file(str(places.data / "tokenizer.json"))
    if sizes.vocab_size != tokenizer.get_vocab_size():
        raise SystemExit(
            f"--vocab-size {sizes.vocab_size}: {places.data} has {tokenizer.get_vocab_size()}"
        )
    model, device = train(config, sizes, stream), stream.device.type
    settle(model)
    write_checkpoint(model, places.data / "tokenizer.json", places.out)
    found = {}
    for length in places.lengths:
        logits_of = logits_in(model, dense_masks(length, sizes.sliding_window, device))
        found[length] = pack_perplexity(logits_of, tokenizer, places.packs, length, device)
    return found


if __name__ == "__main__":
    main()
