"""Train a model of the lab from its recipe on one GPU, and write it as the hub would hold it.

    python tools/train_lab_model.py tools/lab/qwen3_moe.json --data WORK --out DIR

WORK is the output of tools/demo_data.py. A recipe has `train`, how, and either `config`, a
config.json of a family of transformers, whose own model is trained and written in bf16, or
`demo_model`, sizes of the demo's (transformers' gpt_oss trains slowly for its attention). Text is
what nobody generated. --device cpu is to try it at a tiny size.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import train_demo_model as demo
from demo_model import ModelConfig, Permute, by_expert, expert_matmul
from tokenizers import Tokenizer
from torch import Tensor, nn
from training import NATURAL, Schedule, fit, mixture, pack_perplexity, write_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.utils.logging import disable_progress_bar

BIAS = "e_score_correction_bias"


@dataclass(frozen=True)
class LabSchedule(Schedule):
    """How a model of transformers is trained."""

    bias_rate: float = 0.0  # a step's change of correction biases, towards equal load


def experts_forward(module: Any, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """What transformers' grouped_mm gives, with a backward that gathers instead of scattering."""
    working = x_TH.bfloat16() if x_TH.device.type == "cuda" else x_TH
    rows, chosen, order, inverse = by_expert(working, ids_TK, module.num_experts)
    counts = chosen.float().sum(0).long()
    hidden = module._apply_gate(expert_matmul(rows, module.gate_up_proj, counts))
    out = Permute.apply(expert_matmul(hidden, module.down_proj, counts), inverse, order)
    out = out.view(*ids_TK.shape, -1).float() * weights_TK.float()[..., None]
    summed: Tensor = out.sum(1).to(x_TH.dtype)
    return summed


def routers_of(model: nn.Module) -> list[Any]:
    """Of every layer that has experts."""
    return [module.gate for module in model.modules() if hasattr(module, "experts")]


def train(config: LabSchedule, model_config: dict[str, Any], stream: Tensor) -> Any:
    """A model of transformers from scratch; float32 master weights, bf16 matmuls by autocast."""
    torch.manual_seed(config.seed)
    device = stream.device.type
    ALL_EXPERTS_FUNCTIONS.register("lab", experts_forward)
    settings = AutoConfig.for_model(**model_config)
    model = AutoModelForCausalLM.from_config(
        settings, attn_implementation="sdpa", trust_remote_code=False
    ).to(device)
    model.config._experts_implementation = "lab"
    routers, routed = routers_of(model), list[tuple[Tensor, ...]]()
    load_LE = torch.zeros(len(routers), routers[0].weight.shape[0], device=device)
    watched = [
        router.register_forward_hook(lambda module, args, out: routed.append(out))
        for router in routers
    ]

    def losses(ids_BS: Tensor) -> tuple[Tensor, Tensor]:
        routed.clear()
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            logits = model(input_ids=ids_BS, use_cache=False).logits
        loads = [F.one_hot(ids, load_LE.shape[1]).float().mean((0, 1)) for *_, ids in routed]
        load_LE.copy_(torch.stack(loads))
        # the loss of softmax routers; those with a correction bias have that instead
        balances = [
            load_LE.shape[1] * (load * routes.float().softmax(-1).mean(0)).sum()
            for load, (routes, *_) in zip(loads, routed, strict=True)
        ]
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids_BS[:, 1:].flatten())
        return loss, torch.stack(balances).mean()

    @torch.no_grad()
    def shift_biases(step: int, steps: int) -> None:
        for router, load_E in zip(routers, load_LE, strict=True):
            if config.bias_rate:
                getattr(router, BIAS).add_(config.bias_rate * (load_E.mean() - load_E).sign())

    fit(model, losses, config, stream, shift_biases)
    for handle in watched:
        handle.remove()
    print(f"largest load of an expert, layer by layer: {load_LE.amax(1).tolist()}")
    return model.eval()


@torch.no_grad()
def settle(model: nn.Module) -> None:
    """Give every parameter the value the checkpoint will hold."""
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16().float())


def make(recipe: dict[str, Any], places: argparse.Namespace) -> dict[int, dict[str, float]]:
    """Train, round, write, measure: perplexity by length and pack."""
    kind = demo.TrainConfig if "demo_model" in recipe else LabSchedule
    config = kind(**recipe["train"])
    stream = mixture(places.data / "tokens.npz", NATURAL, config.tokens, config.seed, places.device)
    if isinstance(config, demo.TrainConfig):
        return demo.make(config, ModelConfig(**recipe["demo_model"]), stream, places)
    assert isinstance(config, LabSchedule)
    print(config, recipe["config"], flush=True)
    model = train(config, recipe["config"], stream)
    settle(model)

    def logits_of(ids_BS: Tensor) -> Tensor:
        with torch.autocast(places.device, torch.bfloat16, enabled=places.device == "cuda"):
            logits: Tensor = model(input_ids=ids_BS, use_cache=False).logits
        return logits

    tokenizer = Tokenizer.from_file(str(places.data / "tokenizer.json"))
    found = {
        length: pack_perplexity(logits_of, tokenizer, places.packs, length, places.device)
        for length in places.lengths
    }
    biases = {name: bias.clone() for name, bias in model.named_buffers() if name.endswith(BIAS)}
    model.bfloat16()
    for name, bias in biases.items():  # its steps are finer than bf16
        model.get_buffer(name).data = bias
    disable_progress_bar()
    model.save_pretrained(places.out)
    write_tokenizer(places.data / "tokenizer.json", places.out)
    return found


def main(arguments: Sequence[str] | None = None) -> dict[int, dict[str, float]]:
    """Make one model."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="output of tools/demo_data.py")
    parser.add_argument("--packs", type=Path, default=Path("src/eaft_prune/demo/packs"))
    parser.add_argument("--out", type=Path, required=True, help="checkpoint folder to write")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024])
    places = parser.parse_args(arguments)
    return make(json.loads(places.recipe.read_text()), places)


if __name__ == "__main__":
    main()
