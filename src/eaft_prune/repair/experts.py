"""The experts of one layer as plain matrices: what they put out, and how that moves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from eaft_prune.checkpoints.formats.base import Format, Storage
from eaft_prune.core.types import UserError
from eaft_prune.engines import experts as moe
from eaft_prune.repair.conjugate_gradients import fast_products


@dataclass(frozen=True)
class Asked:
    """What experts were asked at N positions: hidden states [N, H], ids and gates [N, K]."""

    hidden: torch.Tensor
    ids: torch.Tensor
    gates: torch.Tensor

    def at(self, rows: torch.Tensor) -> Asked:
        return Asked(self.hidden[rows], self.ids[rows], self.gates[rows])

    def routed(self, n_experts: int, experts: Sequence[int]) -> list[tuple[torch.Tensor, ...]]:
        """Of each of these experts the positions routed to it, ascending, and its gates there."""
        flat, gates = self.ids.reshape(-1), self.gates.reshape(-1)
        order = torch.argsort(flat, stable=True)
        places = torch.split(order, torch.bincount(flat, minlength=n_experts).tolist())
        k = self.ids.shape[1]
        return [(places[e] // k, gates[places[e]]) for e in experts]


def joined(parts: Sequence[Asked]) -> Asked:
    """Parts of several batches, one after another."""
    return Asked(
        torch.cat([part.hidden for part in parts]),
        torch.cat([part.ids for part in parts]),
        torch.cat([part.gates for part in parts]),
    )


@dataclass(frozen=True)
class Experts:
    """E experts of a layer, float32: f(x) = (act((x, 1) gate_up), 1) down.

    The rows of ones are there if the experts have biases. `module` has the activation, of whose
    2I inputs the columns 2i and 2i + 1 make the i-th, or i and I + i if `concatenated`.
    """

    module: Any
    ids: tuple[int, ...]
    gate_up_KXG: torch.Tensor  # X = H, or H + 1
    down_KCH: torch.Tensor  # C = I, or I + 1
    biased: bool

    @property
    def inner(self) -> int:
        """I."""
        return self.down_KCH.shape[1] - self.biased

    @property
    def hidden(self) -> int:
        """H."""
        return self.down_KCH.shape[2]

    def plus(
        self, gate_up_KXG: torch.Tensor | None = None, down_KCH: torch.Tensor | None = None
    ) -> Experts:
        """With these changes; of down projections fewer rows are the last ones."""
        gate_up, down = self.gate_up_KXG, self.down_KCH
        if gate_up_KXG is not None:
            gate_up = gate_up + gate_up_KXG
        if down_KCH is not None:
            down = down.clone()
            down[:, -down_KCH.shape[1] :] += down_KCH
        return replace(self, gate_up_KXG=gate_up, down_KCH=down)

    def pairs(self, columns: torch.Tensor) -> torch.Tensor:
        """[.., 2I] -> [.., 2, I]: the two columns of every activation."""
        half = columns.shape[-1] // 2
        if self.module.is_concatenated:
            return columns.reshape(*columns.shape[:-1], 2, half)
        return columns.reshape(*columns.shape[:-1], half, 2).transpose(-2, -1)

    def unpaired(self, pairs: torch.Tensor) -> torch.Tensor:
        """The inverse of `pairs`."""
        return (pairs if self.module.is_concatenated else pairs.transpose(-2, -1)).flatten(-2)

    def with_one(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows with the 1 that biases multiply, if there are biases, in the type of the weights."""
        rows = rows.to(self.down_KCH.dtype)
        return torch.cat([rows, rows.new_ones(len(rows), 1)], 1) if self.biased else rows

    def before(self, place: int, hidden: torch.Tensor) -> torch.Tensor:
        """What goes into the activation, [n, 2I]."""
        matrix = self.gate_up_KXG[place]
        hidden = hidden.to(matrix.dtype)
        if not self.biased:
            return hidden @ matrix
        return torch.addmm(matrix[-1], hidden, matrix[:-1])

    def activations(self, place: int, hidden: torch.Tensor) -> torch.Tensor:
        """What goes into the down projection, with its 1, [n, C]."""
        return self.with_one(self.module._apply_gate(self.before(place, hidden)))

    def slopes(self, place: int, hidden: torch.Tensor) -> torch.Tensor:
        """How each activation moves with the two columns that make it, [n, 2I]."""
        with torch.inference_mode(False), torch.enable_grad():
            leaf = self.before(place, hidden).clone().requires_grad_()
            (slopes,) = torch.autograd.grad(self.module._apply_gate(leaf).sum(), leaf)
        return slopes

    def outputs(self, asked: Asked) -> torch.Tensor:
        """sum over a token's experts of gate x f(x), [N, H]."""
        out = self.down_KCH.new_zeros(asked.hidden.shape)
        routed = asked.routed(self.module.num_experts, self.ids)
        with fast_products(asked.hidden.dtype != torch.float32):
            for place, (rows, gates) in enumerate(routed):
                inner = self.activations(place, asked.hidden[rows])
                out[rows] += (inner @ self.down_KCH[place]) * gates[:, None].to(out.dtype)
        return out

    def stored(self, names: Sequence[str], storage: Storage) -> dict[str, torch.Tensor]:
        """These projections as a checkpoint stores them, biases too, by name."""
        parts: dict[str, torch.Tensor] = {}
        for name in names:
            matrix = self._matrix(name)
            weight = matrix[:, :-1] if self.biased else matrix
            if _turned(self.module, storage.weight):
                weight = weight.transpose(1, 2)
            parts |= storage.weight.encoded(name, weight)
            if storage.bias is not None:
                parts[f"{name}_bias"] = storage.bias.encode(matrix[:, -1])[0]
        return {name: part.contiguous() for name, part in parts.items()}

    def with_stored(self, stored: Mapping[str, torch.Tensor], storage: Storage) -> Experts:
        """The same experts with what `stored` has of them in place of their own."""
        stored = {name: part.to(self.down_KCH.device) for name, part in stored.items()}
        changed = {
            name: self._read(name, stored, storage) for name in ("gate_up_proj", "down_proj")
        }
        return replace(self, gate_up_KXG=changed["gate_up_proj"], down_KCH=changed["down_proj"])

    def _read(
        self, name: str, stored: Mapping[str, torch.Tensor], storage: Storage
    ) -> torch.Tensor:
        matrix = self._matrix(name)
        if storage.weight.stores(name, stored):
            weight = storage.weight.decoded(name, stored)
            if _turned(self.module, storage.weight):
                weight = weight.transpose(1, 2)
            matrix = torch.cat([weight, matrix[:, -1:]], 1) if self.biased else weight.contiguous()
        if f"{name}_bias" in stored:
            matrix = matrix.clone()
            matrix[:, -1] = stored[f"{name}_bias"].to(matrix)
        return matrix

    def _matrix(self, name: str) -> torch.Tensor:
        return {"gate_up_proj": self.gate_up_KXG, "down_proj": self.down_KCH}[name]


def _turned(module: Any, form: Format) -> bool:
    """Whether plain floats lie as [outputs, inputs]; a grid's order is the format's own."""
    return form.grid is None and not module.is_transposed


def of_module(module: Any, ids: Sequence[int]) -> Experts:
    """Float32 copies of some of a module's experts.

    Raises UserError for experts that are not act(x gate_up) down.
    """
    if not moe.has_gate(module) or getattr(module, "has_post_expert_norm", False):
        raise UserError(
            f"pruning.compensation: {type(module).__name__} are not two projections with a gated "
            "activation between them; use pruning.compensation=none"
        )

    def matrix(name: str) -> torch.Tensor:
        weights = [moe.weight(module, name, expert).float().clone() for expert in ids]
        if module.has_bias:
            bias = getattr(module, f"{name}_bias")
            weights = [torch.cat([w, bias[[e]].float()]) for w, e in zip(weights, ids, strict=True)]
        return torch.stack(weights)

    return Experts(module, tuple(ids), matrix("gate_up_proj"), matrix("down_proj"), module.has_bias)
