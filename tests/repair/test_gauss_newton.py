"""The linearised experts against torch's own derivatives of a loop, the step against numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.func import jacrev, jvp

from eaft_prune.repair.gauss_newton import Linearised, step
from eaft_prune.repair.least_squares import Groups

HIDDEN, INNER, KEPT, TOKENS = 5, 3, 3, 14
DOUBLE = torch.float64


class Problem:
    """Random experts, of which each token has two, and the slopes that autograd gives."""

    def __init__(self, seed: int) -> None:
        # imports triton, which test_kernels.py tells at collection how to run
        from transformers import GptOssConfig
        from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, dtype=DOUBLE)

        self.x_TH = random(TOKENS, HIDDEN)
        self.chosen_T2 = torch.stack(
            [torch.randperm(KEPT, generator=generator)[:2] for _ in range(TOKENS)]
        )
        self.gates_T2 = random(TOKENS, 2).abs()
        self.weight_KXG = random(KEPT, HIDDEN + 1, 2 * INNER)
        self.down_KIH = random(KEPT, INNER, HIDDEN)
        self.target_TH = random(TOKENS, HIDDEN)
        sizes = GptOssConfig(
            hidden_size=HIDDEN, intermediate_size=INNER, num_local_experts=KEPT, swiglu_limit=1.0
        )
        self.activation: Any = GptOssExperts(sizes)._apply_gate

    def output(self, weight_KXG: torch.Tensor) -> torch.Tensor:
        """Token by token, expert by expert."""
        out = []
        for x, experts, gates in zip(self.x_TH, self.chosen_T2, self.gates_T2, strict=True):
            total = torch.zeros(HIDDEN, dtype=DOUBLE)
            for expert, gate in zip(experts.tolist(), gates, strict=True):
                inner = x @ weight_KXG[expert, :-1] + weight_KXG[expert, -1]
                total = total + gate * (self.activation(inner[None])[0] @ self.down_KIH[expert])
            out.append(total)
        return torch.stack(out)

    def linearised(self) -> Linearised:
        inputs = torch.cat([self.x_TH, torch.ones(TOKENS, 1, dtype=DOUBLE)], 1)
        rows, slopes = [], []
        for expert in range(KEPT):
            tokens, slots = (self.chosen_T2 == expert).nonzero(as_tuple=True)
            inner = (inputs[tokens] @ self.weight_KXG[expert]).requires_grad_()
            (slope,) = torch.autograd.grad(self.activation(inner).sum(), inner)
            rows.append(tokens)
            slopes.append(slope * self.gates_T2[tokens, slots][:, None])
        return Linearised(inputs, Groups(TOKENS, tuple(rows), tuple(slopes)), self.down_KIH)

    def jacobian(self) -> np.ndarray:
        """[T H, unknowns]."""
        made: Any = jacrev(self.output)(self.weight_KXG)
        return np.asarray(made.reshape(TOKENS * HIDDEN, -1).numpy())


@pytest.mark.parametrize("seed", range(3))
def test_it_moves_as_the_experts_do_and_pulls_back_transposed(seed: int) -> None:
    problem = Problem(seed)
    linear, jacobian = problem.linearised(), problem.jacobian()
    change = torch.randn_like(problem.weight_KXG)
    _, moved = jvp(problem.output, (problem.weight_KXG,), (change,))
    torch.testing.assert_close(linear.moved(change), moved)
    pulled = linear.pulled(problem.target_TH).reshape(-1).numpy()
    np.testing.assert_allclose(pulled, jacobian.T @ problem.target_TH.reshape(-1).numpy())


def test_squares_are_means_of_the_squared_jacobian() -> None:
    problem = Problem(0)
    linear, jacobian = problem.linearised(), problem.jacobian()
    shape = (KEPT, HIDDEN + 1, 2 * INNER)
    squares = (jacobian.T @ jacobian).reshape(*shape, *shape)
    means, diagonals = linear.squares()
    for k in range(KEPT):
        blocks = [squares[k, :, i, k, :, i] for i in range(2 * INNER)]
        np.testing.assert_allclose(means[k].numpy(), np.mean(blocks, axis=0), atol=1e-12)
        wanted = [np.diag(block).mean() for block in blocks]
        np.testing.assert_allclose(diagonals[k].numpy(), wanted)


@pytest.mark.parametrize("ridge", [0.03, 1.0])
def test_the_step_is_numpys_ridge_least_squares(ridge: float) -> None:
    """Of tokens chosen and weighted; every further iteration is nearer to it."""
    problem = Problem(1)
    chosen = torch.arange(TOKENS) % 4 != 0
    factors = torch.linspace(0.2, 1.5, TOKENS, dtype=DOUBLE)
    linear, target = problem.linearised(), problem.target_TH * factors[:, None]
    linear.slopes.scale_(factors)
    jacobian = problem.jacobian().reshape(TOKENS, HIDDEN, -1) * factors.numpy()[:, None, None]
    rows = jacobian[chosen.numpy()].reshape(-1, jacobian.shape[2])
    wanted = target[chosen].reshape(-1).numpy()
    penalty = ridge * (rows**2).sum(0).mean()
    exact = np.linalg.solve(rows.T @ rows + penalty * np.eye(rows.shape[1]), rows.T @ wanted)
    found, metric = step(linear.of(chosen), target[chosen], ridge, iterations=200)
    np.testing.assert_allclose(found.reshape(-1).numpy(), exact, rtol=1e-4, atol=1e-6)
    blocks, _ = linear.of(chosen).squares()
    torch.testing.assert_close(metric, blocks + penalty * torch.eye(HIDDEN + 1, dtype=DOUBLE))

    def objective(x: np.ndarray) -> float:
        return float(((wanted - rows @ x) ** 2).sum() + penalty * (x**2).sum())

    reached = [objective(np.zeros_like(exact))]
    for iterations in (1, 3, 10):
        few, _ = step(linear.of(chosen), target[chosen], ridge, iterations)
        reached.append(objective(few.reshape(-1).numpy()))
    assert reached == sorted(reached, reverse=True)
    assert reached[-1] >= objective(exact)


def test_experts_that_no_token_reaches_stay() -> None:
    problem = Problem(2)
    problem.chosen_T2 = torch.tensor([[0, 2]] * TOKENS)
    found, _ = step(problem.linearised(), problem.target_TH, 0.03, iterations=20)
    assert not found[1].any()
    assert found[0].any()
    nothing, _ = step(problem.linearised(), torch.zeros_like(problem.target_TH), 0.03, 20)
    assert not nothing.any()
