"""The linearised experts against torch's own derivatives of a loop, the step against numpy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.func import jacrev, jvp

from eaft_prune.repair.experts import Asked, Experts
from eaft_prune.repair.gauss_newton import Linearised, step
from eaft_prune.repair.streams import linearised

HIDDEN, INNER, KEPT, TOKENS = 5, 3, 3, 14
DOUBLE = torch.float64
ONES = torch.ones(TOKENS, dtype=DOUBLE)


def of_gpt_oss() -> Any:
    """Its activation takes even columns as gates and odd ones as factors, both clipped."""
    # imports triton, which test_kernels.py tells at collection how to run
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    sizes = GptOssConfig(
        hidden_size=HIDDEN, intermediate_size=INNER, num_local_experts=KEPT, swiglu_limit=1.0
    )
    return GptOssExperts(sizes)


def of_mixtral() -> Any:
    """No biases; the first half of the columns are gates."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    sizes = MixtralConfig(hidden_size=HIDDEN, intermediate_size=INNER, num_local_experts=KEPT)
    return MixtralExperts(sizes)


class Problem:
    """Random experts, of which each token has two, and the slopes that autograd gives."""

    def __init__(self, seed: int, module: Any = None) -> None:
        self.module = module or of_gpt_oss()
        generator = torch.Generator().manual_seed(seed)
        self.biased: bool = self.module.has_bias

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, dtype=DOUBLE)

        self.x_TH = random(TOKENS, HIDDEN)
        self.chosen_T2 = torch.stack(
            [torch.randperm(KEPT, generator=generator)[:2] for _ in range(TOKENS)]
        )
        self.gates_T2 = random(TOKENS, 2).abs()
        self.weight_KXG = random(KEPT, HIDDEN + self.biased, 2 * INNER)
        self.down_KCH = random(KEPT, INNER + self.biased, HIDDEN)
        self.target_TH = random(TOKENS, HIDDEN)

    def output(self, weight_KXG: torch.Tensor) -> torch.Tensor:
        """Token by token, expert by expert."""
        out = []
        for x, experts, gates in zip(self.x_TH, self.chosen_T2, self.gates_T2, strict=True):
            total = torch.zeros(HIDDEN, dtype=DOUBLE)
            for expert, gate in zip(experts.tolist(), gates, strict=True):
                inner = x @ weight_KXG[expert, :HIDDEN]
                if self.biased:
                    inner = inner + weight_KXG[expert, -1]
                h, down = self.module._apply_gate(inner[None])[0], self.down_KCH[expert]
                total = total + gate * (h @ down[:INNER])
                if self.biased:
                    total = total + gate * down[-1]
            out.append(total)
        return torch.stack(out)

    def halves(self, columns: torch.Tensor) -> torch.Tensor:
        """Of gpt-oss's even and odd columns the even ones first."""
        if not self.biased:
            return columns
        return torch.cat([columns[..., 0::2], columns[..., 1::2]], -1)

    @property
    def experts(self) -> Experts:
        ids = tuple(range(KEPT))
        return Experts(self.module, ids, self.weight_KXG, self.down_KCH, self.biased)

    @property
    def asked(self) -> Asked:
        return Asked(self.x_TH, self.chosen_T2, self.gates_T2)

    def linearised(self, roots_T: torch.Tensor = ONES) -> Linearised:
        return linearised(self.asked, self.experts, roots_T, torch.device("cpu"))

    def jacobian(self) -> np.ndarray:
        """[T H, unknowns]."""
        made: Any = jacrev(self.output)(self.weight_KXG)
        return np.asarray(made.reshape(TOKENS * HIDDEN, -1).numpy())


@pytest.mark.parametrize("module", [of_gpt_oss, of_mixtral])
def test_experts_put_out_what_a_loop_does(module: Callable[[], Any]) -> None:
    problem = Problem(4, module())
    found = problem.experts.outputs(problem.asked)
    torch.testing.assert_close(found, problem.output(problem.weight_KXG))


@pytest.mark.parametrize("module", [of_gpt_oss, of_mixtral])
@pytest.mark.parametrize("seed", range(3))
def test_it_moves_as_the_experts_do_and_pulls_back_transposed(
    seed: int, module: Callable[[], Any]
) -> None:
    problem = Problem(seed, module())
    linear, jacobian = problem.linearised(), problem.jacobian()
    change = torch.randn_like(problem.weight_KXG)
    _, moved = jvp(problem.output, (problem.weight_KXG,), (change,))
    torch.testing.assert_close(linear.moved(problem.halves(change)), moved)
    pulled = linear.pulled(problem.target_TH)
    wanted = jacobian.T @ problem.target_TH.reshape(-1).numpy()
    wanted_KXG = torch.from_numpy(wanted).view_as(change)
    torch.testing.assert_close(pulled, problem.halves(wanted_KXG))
    experts = problem.experts
    torch.testing.assert_close(experts.unpaired(experts.pairs(change)), change, atol=0, rtol=0)


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
        halves = problem.halves(torch.tensor(wanted))
        np.testing.assert_allclose(diagonals[k].numpy(), halves.numpy())


@pytest.mark.parametrize("ridge", [0.03, 1.0])
def test_the_step_is_numpys_ridge_least_squares(ridge: float) -> None:
    """Of tokens chosen and weighted; every further iteration is nearer to it."""
    problem, cpu = Problem(1), torch.device("cpu")
    chosen = torch.arange(TOKENS) % 4 != 0
    roots = torch.linspace(0.2, 1.5, TOKENS, dtype=DOUBLE)
    target = problem.target_TH * roots[:, None]
    linear = linearised(problem.asked.at(chosen), problem.experts, roots[chosen], cpu)
    own = problem.jacobian().reshape(TOKENS * HIDDEN, KEPT, HIDDEN + 1, -1)
    halves = np.concatenate([own[..., 0::2], own[..., 1::2]], -1)
    jacobian = halves.reshape(TOKENS, HIDDEN, -1) * roots.numpy()[:, None, None]
    rows = jacobian[chosen.numpy()].reshape(-1, jacobian.shape[2])
    wanted = target[chosen].reshape(-1).numpy()
    penalty = ridge * (rows**2).sum(0).mean()
    exact = np.linalg.solve(rows.T @ rows + penalty * np.eye(rows.shape[1]), rows.T @ wanted)
    found, metric = stepped(linear, target[chosen], ridge, iterations=200)
    reached = [objective_of(x, rows, wanted, penalty) for x in (exact, found)]
    assert reached[0] <= reached[1] <= reached[0] * 1.01
    blocks, _ = linear.squares()
    torch.testing.assert_close(metric, blocks + penalty * torch.eye(HIDDEN + 1, dtype=DOUBLE))
    tried = [np.zeros_like(exact)]
    for iterations in (1, 3, 10):
        tried.append(stepped(linear, target[chosen], ridge, iterations)[0])
    reached = [objective_of(x, rows, wanted, penalty) for x in tried]
    assert reached == sorted(reached, reverse=True)


def stepped(*given: Any, **named: Any) -> tuple[np.ndarray, torch.Tensor]:
    """A step that has a solution, as one row of numbers."""
    made = step(*given, **named)
    assert made is not None
    return made[0].reshape(-1).numpy(), made[1]


def objective_of(x: np.ndarray, rows: np.ndarray, wanted: np.ndarray, penalty: float) -> float:
    return float(((wanted - rows @ x) ** 2).sum() + penalty * (x**2).sum())


def test_experts_that_no_token_reaches_stay() -> None:
    problem = Problem(2)
    problem.chosen_T2 = torch.tensor([[0, 2]] * TOKENS)
    found, _ = stepped(problem.linearised(), problem.target_TH, 0.03, iterations=20)
    first, second, _ = np.split(found, KEPT)
    assert not second.any()
    assert first.any()
    nothing, _ = stepped(problem.linearised(), torch.zeros_like(problem.target_TH), 0.03, 20)
    assert not nothing.any()


def test_numbers_that_are_not_finite_have_no_step() -> None:
    problem = Problem(3)
    problem.down_KCH[0, 0, 0] = torch.nan
    assert step(problem.linearised(), problem.target_TH, 0.03, 20) is None
