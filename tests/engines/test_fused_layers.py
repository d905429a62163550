"""Norms and attention in fewer passes, interpreted on the CPU, against transformers' own."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # read where kernels are defined: before their import
pytest.importorskip("triton")

from support import architectures  # noqa: E402

from eaft_prune.engines.fused_layers import as_written, fuse  # noqa: E402

DEVICE = torch.device("cuda" if CUDA else "cpu")
LAYERS = 2
IDS = torch.arange(2 * 12).view(2, 12) * 5 % architectures.VOCAB


def model_of(name: str, **changes: Any) -> Any:
    sizes = {"hidden_size": 512, "num_hidden_layers": LAYERS, **changes}
    settings = architectures.tiny_config(name, **sizes)
    return architectures.random_model(settings).to(DEVICE)


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS.to(DEVICE), use_cache=False).logits.double()


# q and k normed by head, not at all, half of the head turned, normed over all heads
@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "glm4_moe", "minimax_m2"])
def test_fused_layers_give_the_logits_of_the_model(name: str) -> None:
    model = model_of(name)
    with torch.no_grad():  # so that a norm's weight matters
        for parameter in (p for n, p in model.named_parameters() if "norm" in n):
            parameter.add_(torch.randn_like(parameter) * 0.2)
    exact = logits(model)
    # each layer's attention and two norms, and the last norm
    assert fuse(model, IDS[:1].to(DEVICE)) == 3 * LAYERS + 1
    ours = logits(model)
    assert not torch.equal(ours, exact)  # it was ours that ran
    assert (ours - exact).norm() < 1e-5 * exact.norm()
    with as_written(model):
        assert torch.equal(logits(model), exact)
    assert torch.equal(logits(model), ours)


def test_a_window_shorter_than_the_block_is_left_to_the_model() -> None:
    model = model_of("mixtral", sliding_window=5)
    exact = logits(model)
    fuse(model, IDS[:1, :4].to(DEVICE))  # where it does not show
    assert (logits(model) - exact).norm() < 1e-5 * exact.norm()


class OffsetRMSNorm(torch.nn.Module):
    """Scales by 1 + weight, as some do."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((width,), 0.5))
        self.variance_epsilon = 1e-6

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        scale = torch.rsqrt(hidden_states.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (1 + self.weight) * hidden_states * scale


class OneNorm(torch.nn.Module):
    def __init__(self, norm: torch.nn.Module) -> None:
        super().__init__()
        self.embed, self.norm = torch.nn.Embedding(architectures.VOCAB, 512), norm

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> torch.Tensor:
        return self.norm(self.embed(input_ids))


def test_a_norm_of_another_formula_stays_as_written() -> None:
    model = OneNorm(OffsetRMSNorm(512)).to(DEVICE)
    assert fuse(model, IDS.to(DEVICE)) == 0
    assert "forward" not in model.norm.__dict__
